{{/* The image of a component: include "image" (list . "ztunnel") */}}
{{- define "image" -}}
{{- $root := index . 0 -}}
{{- printf "%s/%s:%s" $root.Values.image.registry (index . 1) ($root.Values.image.tag | default $root.Chart.AppVersion) -}}
{{- end }}

{{/* Labels of every object of a component: include "labels" (list . "ztunnel") */}}
{{- define "labels" -}}
{{- $root := index . 0 -}}
app: {{ index . 1 }}
app.kubernetes.io/name: {{ index . 1 }}
app.kubernetes.io/part-of: fairlead
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
app.kubernetes.io/version: {{ $root.Values.image.tag | default $root.Chart.AppVersion | quote }}
{{- end }}

{{- define "pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Namespaces that are never in the mesh, with commas between. */}}
{{- define "excludeNamespaces" -}}
{{- append .Values.cni.excludeNamespaces .Release.Namespace | uniq | sortAlpha | join "," -}}
{{- end }}

{{/* The volumes by which a proxy proves who it is and knows its control plane. */}}
{{- define "identityVolumes" -}}
- name: istio-token
  projected:
    sources:
      - serviceAccountToken:
          audience: istio-ca
          expirationSeconds: 43200
          path: istio-token
- name: istiod-ca-cert
  configMap:
    name: istio-ca-root-cert # made by istiod; the pod waits for it
{{- end }}
