package kubedir

import (
	"testing"

	"github.com/fairlead-mesh/fairlead/internal/kubescheme"
)

// FuzzParseFile: a file is refused, or every object of it can be found again by kind and name.
func FuzzParseFile(f *testing.F) {
	f.Add([]byte(twoPods))
	f.Add([]byte("apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Namespace, metadata: {name: a, namespace: b}}\n- {apiVersion: x.example/v1, kind: Y}\n"))
	f.Add([]byte("apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: a}\nspec: {action: DENY, rules: [{from: [{source: {principals: ['*']}}]}]}\n"))
	f.Add([]byte("a: &a [*a]\n---\n- &b [1]\n"))
	scheme, err := kubescheme.New()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, file []byte) {
		objects, _, err := parseFile(scheme, file)
		if err != nil && len(objects) > 0 {
			t.Error("objects of a file that was refused")
		}
		for _, o := range objects {
			if o.meta.GetName() == "" || o.obj.GetObjectKind().GroupVersionKind() != o.gvk || clusterScoped(o.gvk.Kind) != (o.meta.GetNamespace() == "") {
				t.Errorf("accepted %s %q in namespace %q", o.gvk, o.meta.GetName(), o.meta.GetNamespace())
			}
		}
	})
}
