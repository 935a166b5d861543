{{/* The YAML files that the processes read. What the chart decides comes last, so that nothing can contradict the pods. */}}

{{- define "tandem.settings.common" -}}
model: {{ include "tandem.model" . | quote }}
{{- with .Values.model.servedName }}
served_model_name: {{ . | quote }}
{{- end }}
cluster_key: {{ .Values.clusterKey | quote }}
{{- if .Values.tls.existingSecret }}
tls_cert: /etc/tandem/tls/tls.crt
tls_key: /etc/tandem/tls/tls.key
tls_ca: /etc/tandem/tls/ca.crt
tls_name: {{ .Values.tls.name | quote }}
{{- end }}
{{- end -}}

{{- define "tandem.settings.router" -}}
{{- $settings := .Values.router.settings -}}
{{- with omit $settings "drain_s" }}
{{- toYaml . }}
{{ end -}}
{{ include "tandem.settings.common" . }}
host: {{ .Values.router.bind | quote }}
port: {{ .Values.ports.http }}
{{- if eq .Values.discovery.mode "registration" }}
control_host: {{ .Values.router.bind | quote }}
control_port: {{ .Values.ports.control }}
{{- else }}
control_host: 127.0.0.1  # nobody registers
control_port: {{ .Values.ports.control }}
kubernetes_namespace: {{ .Release.Namespace | quote }}
kubernetes_selector: {{ printf "app.kubernetes.io/name=%s,app.kubernetes.io/instance=%s" (include "tandem.name" .) .Release.Name | quote }}
{{- end }}
api_keys: /etc/tandem/keys/keys.yaml
drain_s: {{ include "tandem.drain" $settings | quote }}
{{- end -}}

{{/* Takes root and pool, a whole one. The address is the pod's own: TANDEM_HOST in its environment. */}}
{{- define "tandem.settings.worker" -}}
{{- $settings := .pool.settings -}}
{{- with omit $settings "drain_s" }}
{{- toYaml . }}
{{ end -}}
{{ include "tandem.settings.common" .root }}
{{- if not (hasKey $settings "device") }}
device: {{ ternary "cuda" "cpu" (gt (int .pool.gpus) 0) }}
{{- end }}
port: {{ .root.Values.ports.worker }}
metrics_port: {{ .root.Values.ports.metrics }}
{{- if eq .root.Values.discovery.mode "registration" }}
router:
  {{- include "tandem.controls" .root | trim | nindent 2 }}
{{- end }}
drain_s: {{ include "tandem.drain" $settings | quote }}
{{- end -}}
