{{/* What the schema cannot say. Each fault is one line that names the value and the way out. */}}

{{- define "tandem.checks" -}}
{{- include "tandem.checks.model" . -}}
{{- include "tandem.checks.secrets" . -}}
{{- include "tandem.checks.gateway" . -}}
{{- $roles := dict -}}{{- $names := dict -}}{{- $first := dict -}}
{{- range $index, $given := .Values.pools -}}
{{- $pool := fromYaml (include "tandem.pool" (dict "root" $ "pool" $given)) -}}
{{- $where := printf "pools[%d] (%s)" $index $pool.name -}}
{{- if hasKey $names $pool.name -}}
{{- fail (printf "pools[%d].name is %s, which pools[%d] is called already: give each pool a name of its own" $index $pool.name (int (get $names $pool.name))) -}}
{{- end -}}
{{- if has $pool.name (list "router" "control" "secrets") -}}
{{- fail (printf "pools[%d].name is %s, which the chart's own objects are called: choose another" $index $pool.name) -}}
{{- end -}}
{{- $_ := set $names $pool.name $index -}}
{{- $_ := set $roles $pool.role true -}}
{{- include "tandem.checks.pool" (dict "where" $where "pool" $pool) -}}
{{- range $key := list "dtype" "draft_model" -}}
{{- $value := toString (default "" (get $pool.settings $key)) -}}
{{- if and (hasKey $first $key) (ne (get $first $key) $value) -}}
{{- fail (printf "%s.settings.%s is %q, and another pool's is %q: it must be the same on all workers, so set it in workers.settings" $where $key $value (get $first $key)) -}}
{{- end -}}
{{- $_ := set $first $key $value -}}
{{- end -}}
{{- end -}}
{{- if not (hasKey $roles "decode") -}}
{{- fail "pools has no pool with role decode: without one nothing can be answered, so add one" -}}
{{- end -}}
{{- end -}}

{{- define "tandem.checks.pool" -}}
{{- with .pool -}}
{{- if gt (int .hostsPerWorker) 1 -}}
{{- fail (printf "%s.hostsPerWorker is %d: a worker cannot span hosts yet, so set 1 and choose a model that fits into one GPU" $.where (int .hostsPerWorker)) -}}
{{- end -}}
{{- if gt (int .gpus) 1 -}}
{{- fail (printf "%s.gpus is %d: a worker computes on one GPU, so set gpus 1 and raise replicas" $.where (int .gpus)) -}}
{{- end -}}
{{- if and (hasKey .settings "device") (ne (hasPrefix "cuda" .settings.device) (gt (int .gpus) 0)) -}}
{{- fail (printf "%s.settings.device is %s, and its gpus is %d: leave device out, the chart sets it" $.where .settings.device (int .gpus)) -}}
{{- end -}}
{{- if not .image.repository -}}
{{- fail (printf "%s has no image: set images.%s.repository" $.where (ternary "cuda" "cpu" (gt (int .gpus) 0))) -}}
{{- end -}}
{{- with .autoscaling -}}
{{- if ne .kind "none" -}}
{{- if gt (int .minReplicas) (int .maxReplicas) -}}
{{- fail (printf "%s.autoscaling.minReplicas is %d, above maxReplicas %d" $.where (int .minReplicas) (int .maxReplicas)) -}}
{{- end -}}
{{- if not (or .queuedTokens .pageUse) -}}
{{- fail (printf "%s.autoscaling has neither queuedTokens nor pageUse: set one of them above 0" $.where) -}}
{{- end -}}
{{- end -}}
{{- if and (eq .kind "keda") (not .keda.serverAddress) -}}
{{- fail (printf "%s.autoscaling.keda.serverAddress is empty: give the URL of Prometheus, such as http://prometheus.monitoring:9090" $.where) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "tandem.checks.model" -}}
{{- with .Values.model -}}
{{- $given := list -}}
{{- if .demo }}{{- $given = append $given "demo" -}}{{- end -}}
{{- if .pvc.claimName }}{{- $given = append $given "pvc" -}}{{- end -}}
{{- if .image.reference }}{{- $given = append $given "image" -}}{{- end -}}
{{- if .hub.id }}{{- $given = append $given "hub" -}}{{- end -}}
{{- if ne (len $given) 1 -}}
{{- fail (printf "model has %d sources (%s): give exactly one of demo, pvc.claimName, image.reference and hub.id; with another than demo, set model.demo to false" (len $given) (join ", " $given)) -}}
{{- end -}}
{{- range list "pvc" "image" -}}
{{- if and (has . $given) (not (get (get $.Values.model .) "path")) (not $.Values.model.servedName) -}}
{{- fail (printf "model.servedName is empty: the model is at the root of its volume, which has no name, so say what clients call it or give model.%s.path" .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* On a cluster, every namespace has the ServiceAccount `default`: where it cannot be seen, Secrets cannot either. */}}
{{- define "tandem.checks.secrets" -}}
{{- if and .Values.tls.existingSecret (not .Values.tls.name) -}}
{{- fail "tls.name is empty: processes are called at their pods' addresses, so say which name is in their certificates" -}}
{{- end -}}
{{- if lookup "v1" "ServiceAccount" .Release.Namespace "default" -}}
{{- $wanted := dict "secrets.existingSecret" .Values.secrets.existingSecret "tls.existingSecret" .Values.tls.existingSecret "model.hub.existingSecret" .Values.model.hub.existingSecret -}}
{{- range $value, $name := $wanted -}}
{{- if and $name (not (lookup "v1" "Secret" $.Release.Namespace $name)) -}}
{{- fail (printf "%s is %s: namespace %s has no such Secret, so create it first" $value $name $.Release.Namespace) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "tandem.checks.gateway" -}}
{{- with .Values.gateway -}}
{{- if and .enabled (not .parentRefs) -}}
{{- fail "gateway.parentRefs is empty: name the Gateway that the HTTPRoute belongs to, such as `- name: public`" -}}
{{- end -}}
{{- if and .inferencePool.enabled (not .inferencePool.endpointPicker.name) -}}
{{- fail "gateway.inferencePool.endpointPicker.name is empty: name the Service of an endpoint picker, or leave the InferencePool out" -}}
{{- end -}}
{{- end -}}
{{- end -}}
