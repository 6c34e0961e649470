package netns

import (
	"maps"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-mesh/fairlead/tests/netns/lab"
)

// spoken is what both sides of a conversation saw.
type spoken struct{ Client, Server string }

// road is a way between two pods.
type road struct {
	name     string
	from, to *lab.Pod
	v6       bool
}

// converse holds all conversations on a road, at the same time.
func (f *fixture) converse(r road) map[string]spoken {
	f.t.Helper()
	var mu sync.Mutex
	var all sync.WaitGroup
	seen := map[string]spoken{}
	for _, name := range lab.Conversations() {
		all.Go(func() {
			client, server, err := r.from.Converse(f.ctx, r.to, r.v6, name)
			if err != nil {
				f.t.Errorf("%s: %s: %v", r.name, name, err)
			}
			mu.Lock()
			defer mu.Unlock()
			seen[name] = spoken{client, server}
		})
	}
	all.Wait()
	return seen
}

// different is what cannot be the same in the mesh; docs/tcp.md says why.
var different = map[string]spoken{
	"nobody listens":                {"connected, got 0 (00000000) to ECONNRESET, ", ""},
	lab.NobodyAnswers:               {"connected, got 0 (00000000) to ECONNRESET, ", ""},
	"nobody listens, client speaks": {"connected, got 0 (00000000) to ECONNRESET, ", ""},
	"Multipath TCP":                 {"connected, sent 10, got 10 (cc369edb) to end, multipath false end", "got 10, sent 10, "},
	"urgent byte": {
		"connected, sent 10, urgent: end, sent 10, half closed, got 0 (00000000) to end, ", "got 20, got 1 (6da8fc17) to end, ",
	},
}

// TestTCPIsAsWithoutAMesh: applications see the same of their connections in the mesh, between the nodes and on one, from
// and to what is outside of it, as they do without it; what cannot be the same is listed, here and in docs/tcp.md.
func TestTCPIsAsWithoutAMesh(t *testing.T) {
	f := newFixture(t, ambient)
	far := f.pod(lab.PodSpec{Namespace: outside, Name: "far", Node: 1})
	direct := f.converse(road{"direct", f.legacy, far, false})
	want := maps.Clone(direct)
	for name, s := range different {
		if direct[name] == s {
			t.Errorf("%s is the same without a mesh: %q", name, s)
		}
		want[name] = s
	}
	for _, r := range []road{
		{"tunnel", f.web, f.v1, false},
		{"tunnel, IPv6", f.web, f.v1, true},
		{"same node", f.web, f.near, false},
		{"to outside", f.web, far, false},
		{"from outside", f.legacy, f.v1, false},
	} {
		t.Run(r.name, func(t *testing.T) {
			want, got := maps.Clone(want), f.converse(r)
			if r.from == f.legacy && redirection() == nftables {
				// Both connections would be rewritten to the one port of the proxy; the kernel can keep only one of them.
				const name = "a source port twice"
				if got[name] == want[name] {
					t.Errorf("%s is the same with nftables: %q", name, got[name])
				}
				delete(want, name)
				delete(got, name)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("want (-), in the mesh (+):\n%s", diff)
			}
		})
	}
}

// TestNobodyAnswers: the mesh takes a connection before it knows whether the destination does, so an address that does
// not answer resets it, where the client would have learned it by connecting.
func TestNobodyAnswers(t *testing.T) {
	f := newFixture(t, ambient)
	for _, tc := range []struct {
		name         string
		silent       bool
		direct, mesh string
	}{
		{"dropped", true, "connect: timeout", "connected, got 0 (00000000) to ECONNRESET, "},
		{"unreachable", false, "connect: EHOSTUNREACH", "connected, got 0 (00000000) to ECONNRESET, "},
	} {
		t.Run(tc.name, func(t *testing.T) {
			addr, err := f.Nodes[1].NoRoute(tc.silent)
			f.must(err)
			c := lab.Call{To: netip.AddrPortFrom(addr, lab.PortTCP).String(), Conversation: lab.NobodyAnswers}
			if got := f.call(f.legacy, c).Words; got != tc.direct {
				t.Errorf("direct: %s; want %s", got, tc.direct)
			}
			start := time.Now()
			if got := f.call(f.web, c).Words; got != tc.mesh && got != "connect: ECONNRESET" {
				t.Errorf("in the mesh: %s; want %s", got, tc.mesh)
			}
			t.Logf("after %v", time.Since(start))
		})
	}
}
