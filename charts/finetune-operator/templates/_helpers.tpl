{{/* Name of the chart in labels. */}}
{{- define "finetune-operator.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* Name of every object of the release. */}}
{{- define "finetune-operator.fullname" -}}
{{- $name := include "finetune-operator.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "finetune-operator.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "finetune-operator.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.name is empty and serviceAccount.create is false: name the service account to use" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Labels the operator's pods are selected by. They never change in the life of a release. */}}
{{- define "finetune-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ include "finetune-operator.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{/* Labels of every object. */}}
{{- define "finetune-operator.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/name: {{ include "finetune-operator.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: finetune-operator
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Image reference of (dict "image" … "version" appVersion). */}}
{{- define "finetune-operator.image" -}}
{{- $name := .image.repository -}}
{{- if .image.registry -}}{{- $name = printf "%s/%s" (trimSuffix "/" .image.registry) $name -}}{{- end -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $name .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (default .version .image.tag) -}}
{{- end -}}
{{- end -}}

{{/* The operator's settings.yaml: Settings of operator/finetune_operator/settings.py. */}}
{{- define "finetune-operator.settings" -}}
{{- $settings := deepCopy .Values.settings -}}
{{- $_ := set $settings "namespaces" .Values.watchNamespaces -}}
{{- $_ := set $settings "httpPort" 8080 -}}
{{- $election := default dict (get $settings "leaderElection") -}}
{{- $_ := set $election "leaseName" (include "finetune-operator.fullname" .) -}}
{{- $_ := set $election "namespace" .Release.Namespace -}}
{{- $_ := set $settings "leaderElection" $election -}}
{{- $image := include "finetune-operator.image" (dict "image" .Values.trainer.image "version" .Chart.AppVersion) -}}
{{- $profiles := dict -}}
{{- range $name, $profile := .Values.profiles -}}
{{- $defaults := dict "image" $image "imagePullPolicy" $.Values.trainer.image.pullPolicy -}}
{{- $made := mergeOverwrite $defaults (deepCopy (default dict $profile)) -}}
{{- with $.Values.trainer.imagePullSecrets -}}
{{- $template := default dict (get $made "template") -}}
{{- $spec := default dict (get $template "spec") -}}
{{- $_ := set $spec "imagePullSecrets" (concat . (default list (get $spec "imagePullSecrets")) | uniq) -}}
{{- $_ := set $template "spec" $spec -}}
{{- $_ := set $made "template" $template -}}
{{- end -}}
{{- $_ := set $profiles $name $made -}}
{{- end -}}
{{- $_ := set $settings "profiles" $profiles -}}
{{- toYaml $settings -}}
{{- end -}}

{{/* Whether the ClusterRoles for users are made. */}}
{{- define "finetune-operator.userRoles" -}}
{{- if or (eq .Values.rbac.userRoles "always") (and (eq .Values.rbac.userRoles "auto") (empty .Values.watchNamespaces)) -}}
true
{{- end -}}
{{- end -}}
