{{- define "sonofed.name" -}}
{{- printf "%s-coordinator" .Release.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "sonofed.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "sonofed.labels" -}}
{{ include "sonofed.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "sonofed.port" -}}
{{- regexFind "[0-9]+$" .Values.project.address }}
{{- end }}

{{- define "sonofed.healthz" -}}
exec:
  command:
    - python
    - -c
    - import urllib.request as web; web.urlopen("http://127.0.0.1:{{ .Values.project.health_port | default 8001 }}/healthz", timeout=8)
timeoutSeconds: 10
periodSeconds: 20
{{- end }}
