package netns

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/testenv"
	"github.com/fairlead-mesh/fairlead/tests/netns/lab"
)

// newBareFixture makes a world without this project's agent and control plane, and returns where ztunnel is.
func newBareFixture(t *testing.T) (f *fixture, ztunnel string) {
	t.Helper()
	testenv.RequireRoot(t)
	bin, err := filepath.Abs("../../bin")
	if err != nil {
		t.Fatal(err)
	}
	ztunnel = filepath.Join(bin, "ztunnel")
	_, err = os.Stat(ztunnel)
	testenv.Require(t, err == nil, "bin/ztunnel: hack/build.sh makes it (make test-netns does)")
	w, err := lab.New(lab.Options{Bin: bin, Log: t.Logf})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	f = &fixture{World: w, t: t, ctx: ctx}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(w.Logs())
		}
		if err := w.Close(); err != nil {
			t.Errorf("take the world away: %v", err)
		}
		cancel()
	})
	f.web = f.pod(lab.PodSpec{Namespace: shop, Name: "web"})
	f.near = f.pod(lab.PodSpec{Namespace: shop, Name: "near"})
	f.v1 = f.pod(lab.PodSpec{Namespace: shop, Name: "orders", Node: 1})
	f.legacy = f.pod(lab.PodSpec{Namespace: outside, Name: "legacy"})
	return f, ztunnel
}

// newRulesFixture gives each node of a bare fixture a ztunnel that knows the mesh from a file, and is named its pods;
// redirect lays another agent's rules in these.
func newRulesFixture(t *testing.T) (f *fixture, redirect func(lab.Rules)) {
	t.Helper()
	f, ztunnel := newBareFixture(t)
	authority, err := identity.NewSelfSigned(mesh.DefaultTrustDomain, 0)
	f.must(err)
	file, err := f.Workloads("", f.web, f.near, f.v1)
	f.must(err)
	f.must(f.Nodes[0].StartProxy(f.ctx, ztunnel, file, authority, nil, f.web, f.near))
	f.must(f.Nodes[1].StartProxy(f.ctx, ztunnel, file, authority, nil, f.v1))
	return f, func(kind lab.Rules) {
		for _, p := range []*lab.Pod{f.web, f.near, f.v1} {
			f.must(p.RedirectByRules(kind))
		}
	}
}

// TestDedicated: a ztunnel of one pod's own, with a file and self-made certificates, needs neither agent nor control plane.
func TestDedicated(t *testing.T) {
	f, ztunnel := newBareFixture(t)
	file, err := f.Workloads("", f.web, f.v1)
	f.must(err)
	for _, p := range []*lab.Pod{f.web, f.v1} {
		f.must(p.StartDedicated(f.ctx, ztunnel, file))
	}
	f.mustBePlain(f.web, tcp(f.v1))
	for _, p := range []*lab.Pod{f.web, f.v1} {
		f.must(p.RedirectByRules(lab.RulesRedirect))
	}
	before, err := f.Wire.Total()
	f.must(err)
	f.mustAnswer(f.web, tcp(f.v1))
	f.mustAnswer(f.web, tcp6(f.v1))
	seen, err := f.Wire.Since(before)
	f.must(err)
	if seen.Clear != 0 || seen.Markers != 0 || seen.Tunnel == 0 {
		t.Errorf("captured %+v, want all in the tunnel", seen)
	}
	f.mustBePlain(f.legacy, tcp(f.v1))
}

// TestUnderIstiosRules: where Istio's CNI agent redirects by iptables, and ZDS names the pods, connections go through the
// mesh as they do under this project's agent, with the client's address and TCP as it is.
func TestUnderIstiosRules(t *testing.T) {
	conversations := []string{"echo", "addresses", "half close by the client", "half close by the server", "reset by the client", "reset by the server", "server speaks first", "urgent byte, taken in line"}
	for _, kind := range []lab.Rules{lab.RulesRedirect, lab.RulesTPROXY} {
		t.Run(string(kind), func(t *testing.T) {
			f, redirect := newRulesFixture(t)
			far := f.pod(lab.PodSpec{Namespace: outside, Name: "far", Node: 1})
			f.mustBePlain(f.web, tcp(f.v1)) // proxies alone do nothing
			want := map[string]spoken{}
			for _, name := range conversations {
				client, server, err := f.web.Converse(f.ctx, f.v1, false, name)
				f.must(err)
				want[name] = spoken{client, server}
			}
			redirect(kind)
			f.mustBeHBONE(f.web, f.v1, tcp(f.v1))
			f.mustBeHBONE(f.web, f.v1, tcp6(f.v1))
			f.mustBePlain(f.legacy, tcp(f.v1))
			f.mustBePlain(f.web, tcp(far))
			for _, r := range []road{
				{"tunnel", f.web, f.v1, false},
				{"tunnel, IPv6", f.web, f.v1, true},
				{"same node", f.web, f.near, false},
				{"to outside", f.web, far, true},
				{"from outside", f.legacy, f.v1, false},
				{"from outside, IPv6", f.legacy, f.v1, true},
			} {
				got := map[string]spoken{}
				for _, name := range conversations {
					client, server, err := r.from.Converse(f.ctx, r.to, r.v6, name)
					f.must(err)
					got[name] = spoken{client, server}
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("%s: direct (-), by the rules (+):\n%s", r.name, diff)
				}
			}
			// A connection to the proxy's own port would lead to itself for ever.
			f.mustFail(f.web, lab.Call{To: "127.0.0.1:15001"})
			f.mustFail(f.legacy, lab.Call{To: f.web.Addr(15006, false)})
		})
	}
}
