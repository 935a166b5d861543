{{/* Names and labels. */}}

{{- define "tandem.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 30 | trimSuffix "-" -}}
{{- end -}}

{{- define "tandem.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 30 | trimSuffix "-" -}}
{{- else if contains (include "tandem.name" .) .Release.Name -}}
{{- .Release.Name | trunc 30 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "tandem.name" .) | trunc 30 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "tandem.selector" -}}
app.kubernetes.io/name: {{ include "tandem.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "tandem.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{ include "tandem.selector" . }}
{{- end -}}

{{- define "tandem.router.selector" -}}
{{ include "tandem.selector" . }}
app.kubernetes.io/component: router
{{- end -}}

{{/* Selects a pool. Takes root and pool. */}}
{{- define "tandem.pool.selector" -}}
{{ include "tandem.selector" .root }}
app.kubernetes.io/component: {{ .pool.role }}
tandem-pool: {{ .pool.name }}
{{- end -}}

{{/* Selects the workers of all pools. */}}
{{- define "tandem.workers.selector" -}}
matchLabels:
  {{- include "tandem.selector" . | nindent 2 }}
matchExpressions:
  - {key: app.kubernetes.io/component, operator: In, values: [prefill, decode]}
{{- end -}}

{{- define "tandem.pool.fullname" -}}
{{ include "tandem.fullname" .root }}-{{ .pool.name }}
{{- end -}}

{{/* The workload of a pool as it runs, as YAML; {} where there is none or no cluster to ask. Takes root and pool. */}}
{{- define "tandem.pool.live" -}}
{{- $version := ternary "leaderworkerset.x-k8s.io/v1" "apps/v1" (eq .pool.workload "LeaderWorkerSet") -}}
{{- lookup $version .pool.workload .root.Release.Namespace (include "tandem.pool.fullname" .) | toYaml -}}
{{- end -}}

{{/*
How many workers of a pool the chart asks for, or nothing where a scaler alone says. Takes root and pool.
A field that leaves the chart is reset by Helm, to 1. So a pool whose number the chart once gave, which an annotation
tells, keeps the number that it has when a scaler takes over.
*/}}
{{- define "tandem.pool.replicas" -}}
{{- if eq .pool.autoscaling.kind "none" -}}
{{- .pool.replicas -}}
{{- else -}}
{{- $live := fromYaml (include "tandem.pool.live" .) -}}
{{- if eq "chart" (default "" (dig "metadata" "annotations" "tandem-replicas" "" $live)) -}}
{{- int (dig "spec" "replicas" .pool.autoscaling.minReplicas $live) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Image of a map with repository, tag and digest. Takes root and image. */}}
{{- define "tandem.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ default .root.Chart.AppVersion .image.tag }}
{{- end -}}
{{- end -}}

{{/* Lays the map `over` on the map `under`, in place: maps by key, everything else as a whole; null takes a key away. */}}
{{- define "tandem.overlay" -}}
{{- $under := .under -}}
{{- range $key, $value := .over -}}
{{- if kindIs "invalid" $value -}}
{{- $_ := unset $under $key -}}
{{- else if and (kindIs "map" $value) (kindIs "map" (get $under $key)) -}}
{{- include "tandem.overlay" (dict "under" (get $under $key) "over" $value) -}}
{{- else -}}
{{- $_ := set $under $key $value -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* A pool with what it takes from `workers`, as YAML. Takes root and pool. */}}
{{- define "tandem.pool" -}}
{{- $whole := deepCopy .root.Values.workers -}}
{{- include "tandem.overlay" (dict "under" $whole "over" (deepCopy .pool)) -}}
{{- $image := deepCopy (ternary .root.Values.images.cuda .root.Values.images.cpu (gt (int $whole.gpus) 0)) -}}
{{- include "tandem.overlay" (dict "under" $image "over" $whole.image) -}}
{{- $_ := set $whole "image" $image -}}
{{- toYaml $whole -}}
{{- end -}}

{{- define "tandem.secretName" -}}
{{- default (printf "%s-secrets" (include "tandem.fullname" .)) .Values.secrets.existingSecret -}}
{{- end -}}

{{- define "tandem.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (printf "%s-router" (include "tandem.fullname" .)) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* The setting drain_s as it was given, or its default, which is written out then. */}}
{{- define "tandem.drain" -}}
{{- if hasKey . "drain_s" -}}{{- .drain_s -}}{{- else -}}30{{- end -}}
{{- end -}}

{{/* A duration in seconds: 90, 90s, 1m30s. */}}
{{- define "tandem.seconds" -}}
{{- $sum := 0.0 -}}
{{- if regexMatch "[a-z]$" . -}}
{{- $units := dict "us" 0.000001 "ms" 0.001 "s" 1.0 "m" 60.0 "h" 3600.0 "d" 86400.0 -}}
{{- range regexFindAll "[0-9.]+(e[+-]?[0-9]+)?(us|ms|s|m|h|d)" . -1 -}}
{{- $unit := regexFind "(us|ms|s|m|h|d)$" . -}}
{{- $sum = addf $sum (mulf (float64 (trimSuffix $unit .)) (get $units $unit)) -}}
{{- end -}}
{{- else -}}
{{- $sum = float64 . -}}
{{- end -}}
{{- $sum -}}
{{- end -}}

{{/* Time from a pod's deletion to its SIGKILL: preStop, drain, and 15 s for goodbyes. Takes pre and settings. */}}
{{- define "tandem.grace" -}}
{{- add (int .pre) (ceil (float64 (include "tandem.seconds" (include "tandem.drain" .settings)))) 15 -}}
{{- end -}}

{{/* What the setting `model` of every process is. */}}
{{- define "tandem.model" -}}
{{- with .Values.model -}}
{{- if .pvc.claimName -}}
{{- printf "/models/%s" (trimAll "/" .pvc.path) | trimSuffix "/" -}}
{{- else if .image.reference -}}
{{- printf "/models/%s" (trimAll "/" .image.path) | trimSuffix "/" -}}
{{- else if .hub.id -}}
{{- .hub.id -}}
{{- else -}}
demo
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What clients call the model: served_name of tandem/hub.py. */}}
{{- define "tandem.servedName" -}}
{{- if .Values.model.servedName -}}
{{- .Values.model.servedName -}}
{{- else if eq (include "tandem.model" .) "demo" -}}
tandem-demo
{{- else -}}
{{- include "tandem.model" . | base -}}
{{- end -}}
{{- end -}}

{{/* Control ports of all routers, for workers that register. */}}
{{- define "tandem.controls" -}}
{{- $full := include "tandem.fullname" . -}}
{{- range $index := until (int .Values.router.replicas) }}
- {{ $full }}-router-{{ $index }}.{{ $full }}-control.{{ $.Release.Namespace }}.svc:{{ $.Values.ports.control }}
{{- end -}}
{{- end -}}
