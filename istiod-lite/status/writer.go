package status

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	"sigs.k8s.io/yaml"

	"github.com/fairlead-mesh/fairlead/istiod-lite/source"
)

// Lookup finds an object as it is now; false when it is gone. The object is shared.
type Lookup func(o Object) (runtime.Object, bool)

// FromSources looks objects up in the stores.
func FromSources(s *source.Sources) Lookup {
	return func(o Object) (runtime.Object, bool) {
		switch o.Kind {
		case "AuthorizationPolicy":
			return found(s.AuthorizationPolicys.Get(o.Namespace, o.Name))
		case "Service":
			return found(s.Services.Get(o.Namespace, o.Name))
		case "Gateway":
			return found(s.Gateways.Get(o.Namespace, o.Name))
		case "GatewayClass":
			return found(s.GatewayClasses.Get("", o.Name))
		case "HTTPRoute":
			return found(s.HTTPRoutes.Get(o.Namespace, o.Name))
		case "GRPCRoute":
			return found(s.GRPCRoutes.Get(o.Namespace, o.Name))
		default:
			return nil, false
		}
	}
}

func found[T runtime.Object](obj T, ok bool) (runtime.Object, bool) { return obj, ok }

// Cluster writes to the API server, on top of the version it looked up: a conflict is an error, and tried again with
// the next version.
type Cluster struct {
	source.Clients
	Lookup Lookup
}

// Write implements Writer.
func (c Cluster) Write(ctx context.Context, o Object, want Desired) error {
	obj, ok := c.Lookup(o)
	if !ok {
		return nil
	}
	obj = obj.DeepCopyObject()
	if !apply(obj, want, time.Now()) {
		return nil
	}
	err := c.update(ctx, obj)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("write status of %s: %w", o, err)
	}
	return nil
}

func (c Cluster) update(ctx context.Context, obj runtime.Object) error {
	var err error
	options := metav1.UpdateOptions{}
	switch o := obj.(type) {
	case *securityv1.AuthorizationPolicy:
		_, err = c.Istio.SecurityV1().AuthorizationPolicies(o.Namespace).UpdateStatus(ctx, o, options)
	case *corev1.Service:
		_, err = c.Kubernetes.CoreV1().Services(o.Namespace).UpdateStatus(ctx, o, options)
	case *gatewayv1.Gateway:
		_, err = c.Gateway.GatewayV1().Gateways(o.Namespace).UpdateStatus(ctx, o, options)
	case *gatewayv1.GatewayClass:
		_, err = c.Gateway.GatewayV1().GatewayClasses().UpdateStatus(ctx, o, options)
	case *gatewayv1.HTTPRoute:
		_, err = c.Gateway.GatewayV1().HTTPRoutes(o.Namespace).UpdateStatus(ctx, o, options)
	case *gatewayv1.GRPCRoute:
		_, err = c.Gateway.GatewayV1().GRPCRoutes(o.Namespace).UpdateStatus(ctx, o, options)
	default:
		err = fmt.Errorf("kind %T has no status here", obj)
	}
	return err
}

// Directory writes each status to a file <kind>.<namespace>.<name>.yaml of its own, in a directory beside the
// configuration. The file is the object with its name and status only.
type Directory struct {
	Path   string
	Lookup Lookup
}

// Write implements Writer.
func (d Directory) Write(_ context.Context, o Object, want Desired) error {
	path := filepath.Join(d.Path, fmt.Sprintf("%s.%s.%s.yaml", strings.ToLower(o.Kind), o.Namespace, o.Name))
	obj, ok := d.Lookup(o)
	if !ok {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove status of %s: %w", o, err)
		}
		return nil
	}
	obj = obj.DeepCopyObject()
	text, err := os.ReadFile(path)
	exists := err == nil
	if err := restore(obj, text); err != nil {
		return fmt.Errorf("read status of %s: %w", o, err)
	}
	if !apply(obj, want, time.Now()) {
		return nil
	}
	if !exists && len(want.Conditions) == 0 && want.Gateway == nil {
		return nil
	}
	text, err = render(obj)
	if err != nil {
		return fmt.Errorf("encode status of %s: %w", o, err)
	}
	if err := os.MkdirAll(d.Path, 0o755); err != nil {
		return fmt.Errorf("write status of %s: %w", o, err)
	}
	next := path + ".next"
	if err := errors.Join(os.WriteFile(next, text, 0o644), os.Rename(next, path)); err != nil {
		return fmt.Errorf("write status of %s: %w", o, err)
	}
	return nil
}

// restore puts the status of an earlier write back on the object.
func restore(obj runtime.Object, text []byte) error {
	if len(text) == 0 {
		return nil
	}
	var file struct {
		Status json.RawMessage `json:"status"`
	}
	if err := yaml.Unmarshal(text, &file); err != nil {
		return err
	}
	return json.Unmarshal(fmt.Appendf(nil, `{"status":%s}`, file.Status), obj)
}

// render is the object without all but its name and status.
func render(obj runtime.Object) ([]byte, error) {
	body, err := json.Marshal(obj)
	if err != nil {
		return nil, err
	}
	var all map[string]any
	if err := json.Unmarshal(body, &all); err != nil {
		return nil, err
	}
	metadata, _ := all["metadata"].(map[string]any)
	name := map[string]any{}
	for _, field := range []string{"name", "namespace", "generation"} {
		if v, ok := metadata[field]; ok {
			name[field] = v
		}
	}
	return yaml.Marshal(map[string]any{
		"apiVersion": all["apiVersion"], "kind": all["kind"], "metadata": name, "status": all["status"],
	})
}
