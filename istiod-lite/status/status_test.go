package status

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	istiometa "istio.io/api/meta/v1alpha1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	istiofake "istio.io/client-go/pkg/clientset/versioned/fake"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	k8sfake "k8s.io/client-go/kubernetes/fake"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/fairlead-mesh/fairlead/istiod-lite/source"
)

func accepted(generation int64) Condition {
	return Condition{Type: "ZtunnelAccepted", Status: true, Reason: "Accepted", Message: "m", Generation: generation}
}

func TestPolicyConditions(t *testing.T) {
	first, later := time.Unix(1000, 0), time.Unix(2000, 0)
	p := &securityv1.AuthorizationPolicy{}
	p.Status.Conditions = []*istiometa.IstioCondition{{Type: "Reconciled", Status: "True"}}
	if !apply(p, Desired{Conditions: []Condition{accepted(1)}}, first) {
		t.Fatal("a new condition is a change")
	}
	if apply(p, Desired{Conditions: []Condition{accepted(1)}}, later) {
		t.Error("the same again is no change")
	}
	if !apply(p, Desired{Conditions: []Condition{accepted(2)}}, later) || p.Status.ObservedGeneration != 2 {
		t.Error("a new generation is a change")
	}
	if at := p.Status.Conditions[1].LastTransitionTime.AsTime(); !at.Equal(first) {
		t.Errorf("the status did not turn, and its time went from %s to %s", first, at)
	}
	bad := accepted(2)
	bad.Status, bad.Message = false, "bad"
	// Where two say something of one type, what is wrong wins.
	if !apply(p, Desired{Conditions: []Condition{accepted(2), bad}}, later) || p.Status.Conditions[1].Status != "False" {
		t.Errorf("conditions: %v", p.Status.Conditions)
	}
	if !apply(p, Desired{}, later) || len(p.Status.Conditions) != 1 || p.Status.Conditions[0].Type != "Reconciled" {
		t.Errorf("another's condition is not ours to drop: %v", p.Status.Conditions)
	}
}

func TestServiceConditions(t *testing.T) {
	s := &corev1.Service{}
	s.Status.Conditions = []metav1.Condition{{Type: "Foreign", Status: metav1.ConditionTrue}}
	bound := Condition{Type: "istio.io/WaypointBound", Status: true, Reason: "WaypointAccepted"}
	if !apply(s, Desired{Conditions: []Condition{bound}}, time.Unix(1, 0)) || len(s.Status.Conditions) != 2 {
		t.Errorf("conditions: %v", s.Status.Conditions)
	}
	if !apply(s, Desired{}, time.Unix(1, 0)) || len(s.Status.Conditions) != 1 {
		t.Errorf("conditions: %v", s.Status.Conditions)
	}
}

func TestRouteParents(t *testing.T) {
	ref := func(name string) *gatewayv1.ParentReference {
		return &gatewayv1.ParentReference{Name: gatewayv1.ObjectName(name)}
	}
	r := &gatewayv1.HTTPRoute{}
	r.Status.Parents = []gatewayv1.RouteParentStatus{{ParentRef: *ref("svc"), ControllerName: "example.com/other"}}
	want := Desired{Conditions: []Condition{
		{Parent: ref("svc"), Type: "Accepted", Status: true, Reason: "Accepted", Generation: 3},
		{Parent: ref("svc"), Type: "ResolvedRefs", Reason: "BackendNotFound", Generation: 3},
		{Parent: ref("svc2"), Type: "Accepted", Status: true, Reason: "Accepted", Generation: 3},
	}}
	if !apply(r, want, time.Unix(1, 0)) {
		t.Fatal("no change")
	}
	if apply(r, want, time.Unix(2, 0)) {
		t.Error("the same again is no change")
	}
	var got []string
	for _, p := range r.Status.Parents {
		for _, c := range p.Conditions {
			got = append(got, string(p.ControllerName)+" "+string(p.ParentRef.Name)+" "+c.Type+"="+string(c.Status))
		}
	}
	if diff := cmp.Diff([]string{"istio.io/gateway-controller svc Accepted=True", "istio.io/gateway-controller svc ResolvedRefs=False",
		"istio.io/gateway-controller svc2 Accepted=True"}, got); diff != "" {
		t.Error(diff)
	}
	if !apply(r, Desired{}, time.Unix(3, 0)) || len(r.Status.Parents) != 1 || r.Status.Parents[0].ControllerName != "example.com/other" {
		t.Errorf("parents: %+v", r.Status.Parents)
	}
	alone := &gatewayv1.HTTPRoute{}
	apply(alone, want, time.Unix(1, 0))
	if apply(alone, Desired{}, time.Unix(2, 0)); alone.Status.Parents == nil {
		t.Error("the API refuses a status without a list of parents")
	}
}

// failing fails the first writes.
type failing struct {
	mu     sync.Mutex
	left   int
	writes []Desired
}

func (f *failing) Write(_ context.Context, _ Object, want Desired) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.left > 0 {
		f.left--
		return errors.New("conflict")
	}
	f.writes = append(f.writes, want)
	return nil
}

func (f *failing) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.writes)
}

func wait(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("%s: not within 5 s", what)
}

func TestBoardWritesWhatProducersSayTogether(t *testing.T) {
	w := &failing{left: 2}
	b := NewBoard(w, zap.NewNop())
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { b.Run(ctx); close(done) }()
	defer func() { cancel(); <-done }()
	o := Object{Kind: "AuthorizationPolicy", Namespace: "a", Name: "b"}
	b.Set("one", o, Desired{Conditions: []Condition{accepted(1)}})
	b.Set("two", o, Desired{Conditions: []Condition{{Type: "WaypointAccepted"}}})
	wait(t, "both said, after retries", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return len(w.writes) > 0 && len(w.writes[len(w.writes)-1].Conditions) == 2
	})
	before := w.count()
	b.Set("one", o, Desired{Conditions: []Condition{accepted(1)}})
	time.Sleep(50 * time.Millisecond)
	if w.count() != before {
		t.Error("written again although nothing changed")
	}
	b.Forget(o)
	wait(t, "forgotten", func() bool { return w.count() == before+1 })
}

func TestClusterWritesOnce(t *testing.T) {
	p := &securityv1.AuthorizationPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "b"}}
	clients := source.Clients{Istio: istiofake.NewSimpleClientset(p), Kubernetes: k8sfake.NewClientset()}
	current := func() *securityv1.AuthorizationPolicy {
		got, err := clients.Istio.SecurityV1().AuthorizationPolicies("a").Get(context.Background(), "b", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	c := Cluster{Clients: clients, Lookup: func(Object) (runtime.Object, bool) { return current(), true }}
	o := Object{Kind: "AuthorizationPolicy", Namespace: "a", Name: "b"}
	for range 2 {
		if err := c.Write(context.Background(), o, Desired{Conditions: []Condition{accepted(1)}}); err != nil {
			t.Fatal(err)
		}
	}
	if got := current().Status.Conditions; len(got) != 1 || got[0].Reason != "Accepted" {
		t.Errorf("conditions: %v", got)
	}
	updates := 0
	for _, a := range clients.Istio.(*istiofake.Clientset).Actions() {
		if a.GetVerb() == "update" {
			updates++
		}
	}
	if updates != 1 {
		t.Errorf("%d updates, want 1", updates)
	}
}

func TestDirectoryKeepsTransitionTimes(t *testing.T) {
	p := &securityv1.AuthorizationPolicy{TypeMeta: metav1.TypeMeta{APIVersion: "security.istio.io/v1", Kind: "AuthorizationPolicy"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "b", Generation: 4, Labels: map[string]string{"x": "y"}}}
	gone := false
	d := Directory{Path: filepath.Join(t.TempDir(), ".status"), Lookup: func(Object) (runtime.Object, bool) { return p, !gone }}
	o := Object{Kind: "AuthorizationPolicy", Namespace: "a", Name: "b"}
	path := filepath.Join(d.Path, "authorizationpolicy.a.b.yaml")
	if err := d.Write(context.Background(), o, Desired{}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("a file although there is nothing to say: %v", err)
	}
	read := func() string {
		if err := d.Write(context.Background(), o, Desired{Conditions: []Condition{accepted(4)}}); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	first := read()
	for _, want := range []string{"kind: AuthorizationPolicy", "name: b", "generation: 4", "reason: Accepted", `status: "True"`} {
		if !strings.Contains(first, want) {
			t.Errorf("no %q in\n%s", want, first)
		}
	}
	if second := read(); second != first {
		t.Errorf("written again, differently:\n%s", cmp.Diff(first, second))
	}
	gone = true
	if err := d.Write(context.Background(), o, Desired{}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the file outlives its object: %v", err)
	}
}
