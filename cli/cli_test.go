package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayfake "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned/fake"
	"sigs.k8s.io/yaml"
)

// cluster is what a command finds.
type cluster struct {
	kubernetes *fake.Clientset
	gateway    *gatewayfake.Clientset
	// asked are the pods whose admin interface was asked, and for what.
	asked []string
}

func newCluster(objects ...runtime.Object) *cluster {
	var own []runtime.Object
	c := &cluster{gateway: gatewayfake.NewSimpleClientset()}
	// The fake client's guess of a resource's name is wrong for Gateways, so they go in by the right one, and so does
	// what is applied. (NewClientset, which knows what apply does, has no way around its guess.)
	gateways := gatewayv1.SchemeGroupVersion.WithResource("gateways")
	for _, o := range objects {
		if gw, ok := o.(*gatewayv1.Gateway); ok {
			if err := c.gateway.Tracker().Create(gateways, gw, gw.Namespace); err != nil {
				panic(err) // two of one name
			}
		} else {
			own = append(own, o)
		}
	}
	c.kubernetes = fake.NewClientset(own...)
	c.gateway.PrependReactor("patch", "gateways", func(action k8stesting.Action) (bool, runtime.Object, error) {
		patch := action.(k8stesting.PatchAction)
		gw := &gatewayv1.Gateway{}
		if patch.GetPatchType() != types.ApplyPatchType {
			return true, nil, fmt.Errorf("patch of type %s", patch.GetPatchType())
		}
		if err := yaml.UnmarshalStrict(patch.GetPatch(), gw); err != nil {
			return true, nil, err
		}
		return true, gw, c.gateway.Tracker().Create(gateways, gw, patch.GetNamespace())
	})
	return c
}

// run runs one command line and returns what it prints.
func (c *cluster) run(t *testing.T, line string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	s := &session{out: &out}
	s.connect = func() (*clients, error) {
		k := &clients{kubernetes: c.kubernetes, gateway: c.gateway, namespace: s.namespace}
		if k.namespace == "" {
			k.namespace = "default"
		}
		k.get = func(_ context.Context, namespace, pod, path string) ([]byte, error) {
			c.asked = append(c.asked, namespace+"/"+pod+path)
			return os.ReadFile("testdata/dump.json")
		}
		return k, nil
	}
	root := s.command("v1")
	root.SetArgs(strings.Fields(line))
	root.SetOut(&out)
	root.SetErr(&out)
	err := root.ExecuteContext(t.Context())
	return out.String(), err
}

// lines are the output with each line's runs of spaces as one, so that tables read well here.
func lines(out string) string {
	var b strings.Builder
	for line := range strings.Lines(out) {
		b.WriteString(strings.Join(strings.Fields(line), " ") + "\n")
	}
	return b.String()
}

func namespace(name string, labels map[string]string) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}
}

func proxy(name, node string, phase corev1.PodPhase) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: name, Labels: map[string]string{"app": "ztunnel"}},
		Spec: corev1.PodSpec{NodeName: node}, Status: corev1.PodStatus{Phase: phase}}
}

func TestVersion(t *testing.T) {
	containers := func(image string) corev1.PodTemplateSpec {
		return corev1.PodTemplateSpec{Spec: corev1.PodSpec{Containers: []corev1.Container{{Image: image}}}}
	}
	meta := func(name string) metav1.ObjectMeta { return metav1.ObjectMeta{Namespace: "istio-system", Name: name} }
	c := newCluster(
		&appsv1.Deployment{ObjectMeta: meta("istiod"), Spec: appsv1.DeploymentSpec{Template: containers("r/istiod-lite:v1")},
			Status: appsv1.DeploymentStatus{Replicas: 2, ReadyReplicas: 1}},
		&appsv1.DaemonSet{ObjectMeta: meta("ztunnel"), Spec: appsv1.DaemonSetSpec{Template: containers("r/ztunnel:v1")},
			Status: appsv1.DaemonSetStatus{DesiredNumberScheduled: 3, NumberReady: 3}},
	)
	for line, want := range map[string]string{
		"version":                        "COMPONENT VERSION READY\nfairlead v1 -\nistiod r/istiod-lite:v1 1/2\nztunnel r/ztunnel:v1 3/3\n",
		"version --client":               "COMPONENT VERSION READY\nfairlead v1 -\n",
		"version --client -o yaml":       "client: v1\n",
		"version --client --output=json": "{\n\"client\": \"v1\"\n}\n",
	} {
		out, err := c.run(t, line)
		if err != nil {
			t.Errorf("%s: %v", line, err)
		}
		if diff := cmp.Diff(want, lines(out)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", line, diff)
		}
	}
}

// TestHelp: every command explains itself, and those that a person types have an example that is one of this program's
// own command lines.
func TestHelp(t *testing.T) {
	root := New("v1", &bytes.Buffer{})
	var visit func(c *cobra.Command)
	visit = func(c *cobra.Command) {
		if c.Short == "" {
			t.Errorf("%s has no short description", c.CommandPath())
		}
		if c.Runnable() && c.Example == "" {
			t.Errorf("%s has no example", c.CommandPath())
		}
		for line := range strings.Lines(c.Example) {
			line = strings.TrimSpace(line)
			if line == "" || strings.HasPrefix(line, "#") {
				continue
			}
			line, _, _ = strings.Cut(line, " >")
			found, rest, err := root.Find(strings.Fields(line)[1:])
			if err != nil || !found.Runnable() {
				t.Errorf("example %q is no command: %v", line, err)
				continue
			}
			if err := found.ParseFlags(rest); err != nil {
				t.Errorf("example %q: %v", line, err)
			}
		}
		for _, sub := range c.Commands() {
			visit(sub)
		}
	}
	visit(root)
}

func TestErrorsSayWhatToDo(t *testing.T) {
	c := newCluster(namespace("shop", nil))
	for line, want := range map[string]string{
		"version -o xml":                               `output "xml": want table, json or yaml`,
		"waypoint apply --for everything":              "want service, workload, all or none",
		"waypoint apply -n nowhere --enroll-namespace": "namespace nowhere",
		"waypoint delete":                              "--all",
		"waypoint delete --all one":                    "--all",
		"waypoint delete -n shop gone":                 "waypoint shop/gone",
		"waypoint status -n shop gone":                 "fairlead waypoint list -A",
		"ztunnel-config workloads":                     "is Fairlead installed there?",
		"ztunnel-config services --node n9":            "on node n9",
		"waypoint lst":                                 "unknown command",
		"waypoint list more":                           "unknown command",
	} {
		if out, err := c.run(t, line); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q in it; printed %q", line, err, want, out)
		}
	}
}

func TestNoKubeconfig(t *testing.T) {
	t.Setenv("KUBECONFIG", "/nonexistent")
	t.Setenv("HOME", t.TempDir())
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	root := New("v1", &bytes.Buffer{})
	root.SetArgs([]string{"waypoint", "list", "--kubeconfig", "/nonexistent"})
	err := root.Execute()
	if err == nil || !strings.Contains(err.Error(), "--kubeconfig") || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v, want it to name the flag and the missing file", err)
	}
}
