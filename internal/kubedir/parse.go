package kubedir

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	strictjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// object is one parsed object and where it stands in its file.
type object struct {
	gvk  schema.GroupVersionKind
	line int
	obj  runtime.Object
	meta metav1.Object
}

// document is the text of one YAML document and the line it begins on, counted from 1.
type document struct {
	line int
	text []byte
}

// splitDocuments cuts a file at its "---" lines.
func splitDocuments(file []byte) []document {
	var docs []document
	current := document{line: 1}
	for i, line := range bytes.SplitAfter(file, []byte("\n")) {
		if bytes.HasPrefix(line, []byte("---")) {
			docs = append(docs, current)
			current = document{line: i + 2}
			continue
		}
		current.text = append(current.text, line...)
	}
	return append(docs, current)
}

// parseFile reads every object of a file. ignored names the documents of API groups that are not read here. An error
// carries the line; nothing of such a file is to be used.
func parseFile(scheme *runtime.Scheme, file []byte) (objects []object, ignored []string, err error) {
	for _, doc := range splitDocuments(file) {
		body, err := yaml.YAMLToJSONStrict(doc.text)
		if err != nil {
			return nil, nil, fmt.Errorf("line %d: %w", yamlLine(doc.line, err), err)
		}
		if string(body) == "null" {
			continue
		}
		if err := parseJSON(scheme, doc.line, body, &objects, &ignored); err != nil {
			return nil, nil, fmt.Errorf("line %d: %w", doc.line, err)
		}
	}
	return objects, ignored, nil
}

// parseJSON appends the object in body, or the items when it is a v1 List.
func parseJSON(scheme *runtime.Scheme, line int, body []byte, objects *[]object, ignored *[]string) error {
	var head struct {
		metav1.TypeMeta `json:",inline"`
		Items           []runtime.RawExtension `json:"items"`
	}
	if err := yaml.Unmarshal(body, &head); err != nil {
		return err
	}
	if head.Kind == "List" {
		for _, item := range head.Items {
			if err := parseJSON(scheme, line, item.Raw, objects, ignored); err != nil {
				return err
			}
		}
		return nil
	}
	if head.Kind == "" || head.APIVersion == "" {
		return errors.New("not a Kubernetes object: apiVersion and kind are needed")
	}
	gvk, known := resolve(scheme, head.GroupVersionKind())
	if !known {
		if len(scheme.PrioritizedVersionsForGroup(gvk.Group)) > 0 {
			return fmt.Errorf("unknown kind %s", gvk)
		}
		*ignored = append(*ignored, fmt.Sprintf("line %d: %s", line, gvk))
		return nil
	}
	obj, err := scheme.New(gvk)
	if err != nil {
		return err
	}
	strict, err := strictjson.UnmarshalStrict(body, obj)
	if err = errors.Join(append(strict, err)...); err != nil {
		return fmt.Errorf("%s: %w", gvk.Kind, err)
	}
	obj.GetObjectKind().SetGroupVersionKind(gvk)
	m, err := meta.Accessor(obj)
	if err != nil {
		return err
	}
	if m.GetName() == "" {
		return fmt.Errorf("%s: metadata.name is missing", gvk.Kind)
	}
	if clusterScoped(gvk.Kind) {
		m.SetNamespace("")
	} else if m.GetNamespace() == "" {
		m.SetNamespace(metav1.NamespaceDefault)
	}
	*objects = append(*objects, object{gvk: gvk, line: line, obj: obj, meta: m})
	return nil
}

// resolve picks the version a kind is served in: v1 where the group has the kind in v1, else the version asked for. An
// API server converts between versions; the kinds read here have the same fields in all of them.
func resolve(scheme *runtime.Scheme, gvk schema.GroupVersionKind) (schema.GroupVersionKind, bool) {
	if v1 := gvk.GroupKind().WithVersion("v1"); scheme.Recognizes(v1) {
		return v1, true
	}
	return gvk, scheme.Recognizes(gvk)
}

func clusterScoped(kind string) bool {
	switch kind {
	case "Namespace", "Node", "GatewayClass", "PersistentVolume", "ClusterRole", "ClusterRoleBinding", "StorageClass",
		"PriorityClass", "RuntimeClass", "IngressClass", "CSIDriver", "CSINode", "ClusterTrustBundle", "APIService",
		"ValidatingWebhookConfiguration", "MutatingWebhookConfiguration":
		return true
	}
	return false
}

// yamlLine is the line of the file that a YAML error speaks of, which counts within its document.
func yamlLine(first int, err error) int {
	m := regexp.MustCompile(`line (\d+)`).FindStringSubmatch(err.Error())
	if m == nil {
		return first
	}
	n, convErr := strconv.Atoi(m[1])
	if convErr != nil {
		return first
	}
	return first + n - 1
}

// isConfigFile tells whether a file of the directory is read.
func isConfigFile(name string) bool {
	if strings.HasPrefix(name, ".") {
		return false
	}
	return strings.HasSuffix(name, ".yaml") || strings.HasSuffix(name, ".yml") || strings.HasSuffix(name, ".json")
}
