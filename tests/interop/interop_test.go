// Package interop tests ztunnel with other proxies at the tunnel's other end, in both roles: Istio's ztunnel, whose binary
// PEER_ZTUNNEL names, and Envoy, which hack/envoy.sh fetches (or ENVOY names). A peer that is not given is named in the
// test's output and left out. What applications do with TCP is held through each pair and compared with the same without
// proxies.
package interop

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

func TestMain(m *testing.M) {
	lab.RunIfChild()
	os.Exit(m.Run())
}

// proxy is what carries a pod's connections.
type proxy string

const (
	fairlead proxy = "fairlead"
	istio    proxy = "istio's ztunnel"
	envoy    proxy = "envoy"
)

// binary is where a proxy's program is; a peer that is not there skips the test.
func (p proxy) binary(t *testing.T) string {
	t.Helper()
	switch p {
	case istio:
		return testenv.RequireEnv(t, "PEER_ZTUNNEL", "the binary of Istio's ztunnel")
	case envoy:
		path := os.Getenv("ENVOY")
		testenv.Require(t, path != "", "Envoy: ENVOY=$(hack/envoy.sh) fetches it (make test-netns does)")
		return path
	}
	path, err := filepath.Abs("../../bin/ztunnel")
	if err != nil {
		t.Fatal(err)
	}
	_, err = os.Stat(path)
	testenv.Require(t, err == nil, "bin/ztunnel: hack/build.sh makes it (make test-netns does)")
	return path
}

// world is a client on one node and a server on another, with a proxy each.
type world struct {
	*lab.World
	t              *testing.T
	ctx            context.Context
	authority      *identity.SelfSigned
	client, server *lab.Pod
}

func newWorld(t *testing.T) *world {
	t.Helper()
	testenv.RequireRoot(t)
	l, err := lab.New(lab.Options{Bin: "../../bin", Log: t.Logf})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	w := &world{World: l, t: t, ctx: ctx}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(l.Logs())
		}
		if err := l.Close(); err != nil {
			t.Errorf("take the world away: %v", err)
		}
		cancel()
	})
	w.authority, err = identity.NewSelfSigned(mesh.DefaultTrustDomain, 0)
	w.must(err)
	w.client, err = l.Pod(ctx, lab.PodSpec{Namespace: "shop", Name: "client"})
	w.must(err)
	w.server, err = l.Pod(ctx, lab.PodSpec{Namespace: "shop", Name: "server", ServiceAccount: "server", Node: 1})
	w.must(err)
	return w
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// start gives the two pods their proxies, and redirects them as Istio's CNI agent does.
func (w *world) start(clients, servers proxy) {
	w.t.Helper()
	file, err := w.Workloads("services: []\npolicies: []\n", w.client, w.server)
	w.must(err)
	for i, side := range []struct {
		proxy proxy
		pod   *lab.Pod
	}{{clients, w.client}, {servers, w.server}} {
		binary := side.proxy.binary(w.t)
		if side.proxy == envoy {
			w.must(side.pod.StartEnvoy(w.ctx, binary, w.authority))
		} else {
			w.must(w.Nodes[i].StartProxy(w.ctx, binary, file, w.authority, nil, side.pod))
		}
		w.must(side.pod.RedirectByRules(lab.RulesRedirect))
	}
}

// spoken is what both sides of a conversation saw.
type spoken struct{ Client, Server string }

// converse holds all conversations between the two pods, one after the other: beside others, an Envoy that serves loses
// bytes when the server closes first, between two Envoys as well.
func (w *world) converse() map[string]spoken {
	w.t.Helper()
	seen := map[string]spoken{}
	for _, name := range lab.Conversations() {
		client, server, err := w.client.Converse(w.ctx, w.server, false, name)
		if err != nil {
			w.t.Errorf("%s: %v", name, err)
		}
		seen[name] = spoken{client, server}
	}
	return seen
}

// different is what no mesh passes on as it is without one: docs/tcp.md.
var different = map[string]string{
	lab.NobodyAnswers: "the client's proxy has accepted", "nobody listens": "the same", "nobody listens, client speaks": "the same",
	"Multipath TCP": "proxies speak TCP", "urgent byte": "proxies take it in line, or not at all",
}

// weak is what a peer does not pass on in a role; it does not with another of its kind at the other end either.
var weak = map[proxy]struct{ client, server map[string]string }{
	istio: {client: istioEnds, server: istioEnds},
	envoy: {
		client: map[string]string{
			"write after the reader has gone": "a reset after the end is not passed on",
			"urgent byte, taken in line":      "drops it",
			"reset at once":                   "may end in order, when the reset comes together with the answer",
		},
		server: map[string]string{
			"addresses":                "shows its own address",
			"half close by the server": "resets what the client still sends",
			"one way, back":            "resets the stream while bytes wait for the window, when the server closes",
			"slow reader":              "the same",
			"closed with bytes unread": "may end in order",
			"reset by the client":      "ends in order",
		},
	},
}

// istioEnds: resets become ends in order.
var istioEnds = map[string]string{
	"closed with bytes unread": "ends in order", "reset at once": "ends in order", "reset by the client": "ends in order",
	"reset by the server": "ends in order", "write after the reader has gone": "ends in order",
	"urgent byte, taken in line": "drops it",
}

// TestPairs holds all conversations through pairs of proxies and wants to see what is seen without, but for what a peer
// cannot do. The capture is the control: what goes through the proxies is not readable, and there is nothing else.
func TestPairs(t *testing.T) {
	for _, tc := range []struct{ clients, servers proxy }{
		{fairlead, fairlead}, {fairlead, istio}, {istio, fairlead}, {fairlead, envoy}, {envoy, fairlead},
	} {
		t.Run(string(tc.clients+" to "+tc.servers), func(t *testing.T) {
			for _, p := range []proxy{tc.clients, tc.servers} {
				p.binary(t)
			}
			w := newWorld(t)
			want := w.converse()
			w.start(tc.clients, tc.servers)
			before, err := w.Wire.Total()
			w.must(err)
			if a, err := w.client.Call(w.ctx, lab.Call{To: w.server.Addr(lab.PortTCP, false)}); err != nil || !a.OK() {
				t.Fatalf("a first call: %s %v", a, err)
			}
			got := w.converse()
			seen, err := w.Wire.Since(before)
			w.must(err)
			if seen.Clear != 0 || seen.Tunnel == 0 {
				t.Errorf("captured %+v, want all of it in tunnels", seen)
			}
			for _, except := range []map[string]string{different, weak[tc.clients].client, weak[tc.servers].server} {
				for name, why := range except {
					if want[name] == (spoken{}) {
						t.Errorf("no conversation is called %q", name)
					}
					if want[name] != got[name] {
						t.Logf("%s: %s\n\tdirect  %+v\n\tproxies %+v", name, why, want[name], got[name])
					}
					delete(want, name)
					delete(got, name)
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("direct (-), by the proxies (+):\n%s", diff)
			}
		})
	}
}
