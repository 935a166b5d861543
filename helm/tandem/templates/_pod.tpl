{{/* What all pods have in common. */}}

{{- define "tandem.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.security.runAsUser }}
runAsGroup: {{ .Values.security.runAsGroup }}
fsGroup: {{ .Values.security.runAsGroup }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* Takes the list of capabilities to add. */}}
{{- define "tandem.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
  {{- with . }}
  add: {{ toJson . }}
  {{- end }}
{{- end -}}

{{/* Secrets and folders in the environment: no flags, because command lines are for all to see. */}}
{{- define "tandem.env" -}}
- name: TANDEM_TOKEN
  valueFrom: {secretKeyRef: {name: {{ include "tandem.secretName" . }}, key: {{ .Values.secrets.tokenKey }}}}
- name: TANDEM_METRICS_TOKEN
  valueFrom: {secretKeyRef: {name: {{ include "tandem.secretName" . }}, key: {{ .Values.secrets.metricsTokenKey }}}}
- {name: HOME, value: /cache}
- {name: XDG_CACHE_HOME, value: /cache}
- {name: TMPDIR, value: /tmp}
{{- with .Values.model.hub }}
{{- if .id }}
- {name: HF_HOME, value: {{ ternary "/hub" "/cache/huggingface" (not (empty .cacheClaim)) }}}
{{- with .endpoint }}
- {name: HF_ENDPOINT, value: {{ . | quote }}}
{{- end }}
{{- with .existingSecret }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $.Values.model.hub.secretKey }}}}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Takes root, settings (name of the ConfigMap), cacheSize. */}}
{{- define "tandem.volumes" -}}
{{- $values := .root.Values -}}
- name: settings
  configMap: {name: {{ .settings }}}
- name: tmp
  emptyDir: {sizeLimit: 1Gi}
- name: cache
  emptyDir: {sizeLimit: {{ .cacheSize }}}
{{- with $values.tls.existingSecret }}
- name: tls
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- with $values.model }}
{{- if .pvc.claimName }}
- name: model
  persistentVolumeClaim: {claimName: {{ .pvc.claimName }}, readOnly: true}
{{- else if .image.reference }}
- name: model
  image: {reference: {{ .image.reference | quote }}, pullPolicy: {{ .image.pullPolicy }}}
{{- end }}
{{- if and .hub.id .hub.cacheClaim }}
- name: hub
  persistentVolumeClaim: {claimName: {{ .hub.cacheClaim }}}
{{- end }}
{{- end }}
{{- end -}}

{{- define "tandem.mounts" -}}
- {name: settings, mountPath: /etc/tandem/settings, readOnly: true}
- {name: tmp, mountPath: /tmp}
- {name: cache, mountPath: /cache}
{{- if .Values.tls.existingSecret }}
- {name: tls, mountPath: /etc/tandem/tls, readOnly: true}
{{- end }}
{{- if or .Values.model.pvc.claimName .Values.model.image.reference }}
- {name: model, mountPath: /models, readOnly: true}
{{- end }}
{{- if and .Values.model.hub.id .Values.model.hub.cacheClaim }}
- {name: hub, mountPath: /hub}
{{- end }}
{{- end -}}

{{/* Three probes with three meanings. Takes port, starts (path of the startup probe) and probes.
startup: it has loaded; readiness: it takes requests; liveness: it still answers, however busy. */}}
{{- define "tandem.probes" -}}
startupProbe:
  httpGet: {path: {{ .starts }}, port: {{ .port }}}
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: {{ div (add (int .probes.startupSeconds) 4) 5 }}
readinessProbe:
  httpGet: {path: /ready, port: {{ .port }}}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 2
livenessProbe:
  httpGet: {path: /health, port: {{ .port }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: {{ div (add (int .probes.livenessSeconds) 9) 10 }}
{{- end -}}

{{/* What goes before SIGTERM: a sleep. One of no length is left out, because Kubernetes refuses it before 1.33. */}}
{{- define "tandem.lifecycle" -}}
{{- if gt (int .) 0 -}}
lifecycle:
  preStop: {sleep: {seconds: {{ . }}}}
{{- end -}}
{{- end -}}

{{/* Where pods go. Takes pod (values) and selector. */}}
{{- define "tandem.placement" -}}
{{- with .pod.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .pod.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- range . }}
  {{- $own := dict "labelSelector" (dict "matchLabels" (fromYaml $.selector)) }}
  - {{- toYaml (merge (deepCopy .) $own) | nindent 4 }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* The pod template of a pool. Takes root and pool, a whole one. */}}
{{- define "tandem.worker.template" -}}
{{- $root := .root -}}{{- $pool := .pool -}}{{- $name := include "tandem.pool.fullname" . -}}
metadata:
  labels:
    {{- include "tandem.pool.selector" . | nindent 4 }}
    {{- with $pool.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    checksum/settings: {{ include "tandem.settings.worker" . | sha256sum }}
    {{- if and $pool.rdma.enabled $pool.rdma.networks }}
    k8s.v1.cni.cncf.io/networks: {{ $pool.rdma.networks | quote }}
    {{- end }}
    {{- with $pool.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  automountServiceAccountToken: false
  enableServiceLinks: false  # a Service called tandem would set TANDEM_PORT
  terminationGracePeriodSeconds: {{ include "tandem.grace" (dict "pre" $pool.preStopSeconds "settings" $pool.settings) }}
  {{- with $pool.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  securityContext:
    {{- include "tandem.podSecurity" $root | nindent 4 }}
  {{- with $root.Values.images.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- include "tandem.placement" (dict "pod" $pool "selector" (include "tandem.pool.selector" .)) | nindent 2 }}
  containers:
    - name: worker
      image: {{ include "tandem.image" (dict "root" $root "image" $pool.image) | quote }}
      imagePullPolicy: {{ $pool.image.pullPolicy }}
      args:
        - {{ $pool.role }}
        - --config=/etc/tandem/settings/settings.yaml
        {{- with $pool.extraArgs }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      env:
        - name: TANDEM_HOST
          valueFrom: {fieldRef: {fieldPath: status.podIP}}
        {{- if not (hasKey $pool.settings "threads") }}
        - name: TANDEM_THREADS  # without a limit these are the node's cores
          valueFrom: {resourceFieldRef: {containerName: worker, resource: limits.cpu}}
        {{- end }}
        {{- include "tandem.env" $root | nindent 8 }}
        {{- include "tandem.network.env" $pool | nindent 8 }}
        {{- with $pool.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        - {name: grpc, containerPort: {{ $root.Values.ports.worker }}}
        - {name: metrics, containerPort: {{ $root.Values.ports.metrics }}}
      {{- include "tandem.probes" (dict "port" "metrics" "starts" "/ready" "probes" $pool.probes) | nindent 6 }}
      {{- include "tandem.lifecycle" $pool.preStopSeconds | nindent 6 }}
      resources:
        {{- include "tandem.worker.resources" $pool | nindent 8 }}
      securityContext:
        {{- include "tandem.containerSecurity" (ternary (list "IPC_LOCK") list $pool.rdma.enabled) | nindent 8 }}
      volumeMounts:
        {{- include "tandem.mounts" $root | nindent 8 }}
        - {name: shm, mountPath: /dev/shm}
        {{- with $pool.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    {{- include "tandem.volumes" (dict "root" $root "settings" $name "cacheSize" $pool.cacheSize) | nindent 4 }}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $pool.shmSize }}}
    {{- with $pool.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* UCX, which carries KV under NIXL, and NCCL. Takes a whole pool. */}}
{{- define "tandem.network.env" -}}
{{- if .rdma.enabled }}
- {name: UCX_TLS, value: {{ printf "%s%s" .rdma.ucxTls (ternary ",cuda_copy,cuda_ipc" "" (gt (int .gpus) 0)) | quote }}}
{{- with .rdma.ucxNetDevices }}
- {name: UCX_NET_DEVICES, value: {{ . | quote }}}
{{- end }}
- {name: UCX_IB_GPU_DIRECT_RDMA, value: {{ ternary "try" "n" (gt (int .gpus) 0) | quote }}}
{{- with .rdma.ncclIbHca }}
- {name: NCCL_IB_HCA, value: {{ . | quote }}}
{{- end }}
{{- with .rdma.ncclSocketIfname }}
- {name: NCCL_SOCKET_IFNAME, value: {{ . | quote }}}
{{- end }}
{{- end }}
{{- end -}}

{{/* The pool's own, and devices, which are asked for as much as they are limited. Takes a whole pool. */}}
{{- define "tandem.worker.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- $devices := dict -}}
{{- if gt (int .gpus) 0 }}{{- $_ := set $devices .gpuResource (toString (int .gpus)) -}}{{- end -}}
{{- if .rdma.enabled }}{{- $_ := set $devices .rdma.resource (toString (int .rdma.count)) -}}{{- end -}}
{{- if $devices }}{{- include "tandem.overlay" (dict "under" $resources "over" (dict "limits" $devices)) -}}{{- end -}}
{{- toYaml $resources -}}
{{- end -}}
