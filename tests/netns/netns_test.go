// Package netns tests the mesh's real programs on a real kernel, on nodes made of network namespaces (package lab). Each
// statement about the mesh has its control beside it: the same call where the mesh does not act.
package netns

import (
	"cmp"
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/testenv"
	"github.com/fairlead-mesh/fairlead/tests/netns/lab"
)

func TestMain(m *testing.M) {
	lab.RunIfChild()
	os.Exit(m.Run())
}

const (
	shop    = "shop"
	outside = "outside"
)

var (
	plain   = map[string]string{}
	ambient = map[string]string{"istio.io/dataplane-mode": "ambient"}
)

// programs are the binaries that a mesh consists of.
var programs = []string{"cni-agent", "cni-plugin", "istiod-lite", "waypoint", "ztunnel"}

// fixture is a mesh on two nodes with clients (web, batch, and legacy in a namespace that is never in the mesh) and a
// near server on node1, and two versions of a server on node2.
type fixture struct {
	*lab.World
	t                                *testing.T
	ctx                              context.Context
	web, batch, near, legacy, v1, v2 *lab.Pod
	orders                           *lab.Service
	// cniBefore is what CNI files the nodes had before the mesh came.
	cniBefore map[string]string
}

// newFixture makes a world whose namespace shop has the labels.
func newFixture(t *testing.T, labels map[string]string) *fixture {
	t.Helper()
	testenv.RequireBPF(t)
	bin, err := filepath.Abs("../../bin")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range programs {
		if _, err := os.Stat(filepath.Join(bin, p)); err != nil {
			testenv.Require(t, false, "bin/"+p+": hack/build.sh makes it (make test-netns does)")
		}
	}
	w, err := lab.New(lab.Options{Bin: bin, Redirection: redirection(), Log: t.Logf})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	f := &fixture{World: w, t: t, ctx: ctx, cniBefore: map[string]string{}}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(w.Logs())
		}
		if err := w.Close(); err != nil {
			t.Errorf("take the world away: %v", err)
		}
		cancel()
	})
	for _, n := range w.Nodes {
		f.cniBefore[n.Name], err = n.CNIFiles()
		f.must(err)
	}
	f.must(w.StartMesh(ctx))
	f.must(w.Namespace(shop, labels))
	f.must(w.Namespace(outside, nil))
	f.web = f.pod(lab.PodSpec{Namespace: shop, Name: "web", Labels: map[string]string{"app": "web"}})
	f.batch = f.pod(lab.PodSpec{Namespace: shop, Name: "batch", Labels: map[string]string{"app": "batch"}})
	f.near = f.pod(lab.PodSpec{Namespace: shop, Name: "near", Labels: map[string]string{"app": "near"}})
	f.legacy = f.pod(lab.PodSpec{Namespace: outside, Name: "legacy"})
	f.v1 = f.pod(lab.PodSpec{Namespace: shop, Name: "orders-v1", ServiceAccount: "orders", Node: 1, Labels: map[string]string{"app": "orders", "version": "v1"}})
	f.v2 = f.pod(lab.PodSpec{Namespace: shop, Name: "orders-v2", ServiceAccount: "orders", Node: 1, Labels: map[string]string{"app": "orders", "version": "v2"}})
	f.orders = f.service("orders", map[string]string{"app": "orders"})
	if len(labels) > 0 {
		f.awaitTunnels()
	}
	return f
}

// redirection is the way in which the tests' meshes redirect: every test holds for either.
func redirection() string { return cmp.Or(os.Getenv("FAIRLEAD_REDIRECTION"), ebpf) }

const (
	ebpf     = "ebpf"
	nftables = "nftables"
)

func (f *fixture) must(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

// pod makes a pod; its service account is called like it unless said otherwise.
func (f *fixture) pod(spec lab.PodSpec) *lab.Pod {
	f.t.Helper()
	if spec.ServiceAccount == "" {
		spec.ServiceAccount = spec.Name
	}
	p, err := f.Pod(f.ctx, spec)
	f.must(err)
	return p
}

func (f *fixture) service(name string, selector map[string]string) *lab.Service {
	f.t.Helper()
	s, err := f.Service(lab.ServiceSpec{Namespace: shop, Name: name, Selector: selector})
	f.must(err)
	return s
}

// awaitTunnels waits until the pods of shop reach one another through the mesh.
func (f *fixture) awaitTunnels() {
	f.t.Helper()
	for _, p := range []*lab.Pod{f.web, f.batch, f.near, f.v1, f.v2} {
		f.awaitEnrolled(p, true)
	}
	for _, to := range []*lab.Pod{f.near, f.v1, f.v2} {
		f.until(f.web, tcp(to), lab.Answer.OK)
	}
}

// awaitEnrolled waits until a pod is in the mesh, or not any more.
func (f *fixture) awaitEnrolled(p *lab.Pod, enrolled bool) {
	f.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); p.Enrolled(f.ctx) != enrolled; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			f.t.Fatalf("pod %s: enrolled is not %v in time", p.Name, enrolled)
		}
	}
}

// until waits until a call comes out as wanted, which a change of configuration must bring about within a second.
func (f *fixture) until(from *lab.Pod, c lab.Call, wanted func(lab.Answer) bool) {
	f.t.Helper()
	took, err := f.Until(f.ctx, from, c, wanted)
	f.must(err)
	if took > time.Second {
		f.t.Errorf("it took %v until the change was in force", took)
	}
}

// call makes a call and returns what came of it.
func (f *fixture) call(from *lab.Pod, c lab.Call) lab.Answer {
	f.t.Helper()
	a, err := from.Call(f.ctx, c)
	f.must(err)
	return a
}

func (f *fixture) mustAnswer(from *lab.Pod, c lab.Call) {
	f.t.Helper()
	if a := f.call(from, c); !a.OK() {
		f.t.Errorf("%s → %s: %s", from.Name, c.To, a)
	}
}

func (f *fixture) mustFail(from *lab.Pod, c lab.Call) {
	f.t.Helper()
	if a := f.call(from, c); !a.Failed() {
		f.t.Errorf("%s → %s: %s, it must not be answered", from.Name, c.To, a)
	}
}

// observe makes a call and collects what proxies and capture saw.
func (f *fixture) observe(from *lab.Pod, c lab.Call, lines int) lab.Observation {
	f.t.Helper()
	o, err := f.Observe(f.ctx, from, c, lines)
	f.must(err)
	return o
}

// mustBeHBONE wants a call through a tunnel between the nodes, by these two identities, of which nothing is readable.
func (f *fixture) mustBeHBONE(from, to *lab.Pod, c lab.Call) {
	f.t.Helper()
	o := f.observe(from, c, 2)
	if !o.Answer.OK() {
		f.t.Fatalf("%s → %s: %s", from.Name, c.To, o.Answer)
	}
	if o.Wire.Clear != 0 || o.Wire.Markers != 0 || o.Wire.Tunnel < int64(2*c.Size) {
		f.t.Errorf("%s → %s: captured %+v, want %d bytes or more and all of them in the tunnel", from.Name, c.To, o.Wire, 2*c.Size)
	}
	if o.Outbound == nil || o.Outbound.DestinationIdentity != to.Identity() {
		f.t.Errorf("%s → %s: the source's proxy logged %+v, want the destination's identity %s", from.Name, c.To, o.Outbound, to.Identity())
	}
	if o.Inbound == nil || o.Inbound.SourceIdentity != from.Identity() {
		f.t.Errorf("%s → %s: the destination's proxy logged %+v, want the source's identity %s", from.Name, c.To, o.Inbound, from.Identity())
	}
}

// mustBePlain wants a call that the capture can read: the control of mustBeHBONE.
func (f *fixture) mustBePlain(from *lab.Pod, c lab.Call) {
	f.t.Helper()
	o := f.observe(from, c, 0)
	if !o.Answer.OK() {
		f.t.Fatalf("%s → %s: %s", from.Name, c.To, o.Answer)
	}
	if o.Wire.Clear < int64(2*c.Size) || o.Wire.Markers == 0 || o.Wire.Tunnel != 0 {
		f.t.Errorf("%s → %s: captured %+v, want %d bytes or more and all of them readable", from.Name, c.To, o.Wire, 2*c.Size)
	}
}

// tcp is a call to a pod, of a size that spans several packets and TLS records.
func tcp(to *lab.Pod) lab.Call { return lab.Call{To: to.Addr(lab.PortTCP, false), Size: 50_000} }

// tcp6 is the same over IPv6.
func tcp6(to *lab.Pod) lab.Call { return lab.Call{To: to.Addr(lab.PortTCP, true), Size: 50_000} }
