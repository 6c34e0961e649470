package netns

import (
	"strings"
	"testing"
	"time"

	"github.com/fairlead-mesh/fairlead/tests/netns/lab"
)

// TestLabelTakesRunningPodsInAndOut is the main promise: a label, no restart, and the same calls are on mutual TLS; the
// label gone, they are as they were before.
func TestLabelTakesRunningPodsInAndOut(t *testing.T) {
	f := newFixture(t, plain)
	pids := []int{f.web.PID(), f.v1.PID()}
	f.mustBePlain(f.web, tcp(f.v1))
	f.mustBePlain(f.web, tcp6(f.v1))

	// This connection is older than the label, and must not notice.
	longLived := make(chan lab.Answer, 1)
	go func() {
		c := tcp(f.v1)
		c.SameConnection, c.Duration, c.Interval = true, 2*time.Second, 20*time.Millisecond
		a, err := f.batch.Call(f.ctx, c)
		if err != nil {
			t.Error(err)
		}
		longLived <- a
	}()
	time.Sleep(100 * time.Millisecond)

	f.must(f.Namespace(shop, ambient))
	f.awaitTunnels()
	if a := <-longLived; !a.OK() || len(a.Attempts) < 20 {
		t.Errorf("the connection from before the label: %s", a)
	}
	f.mustBeHBONE(f.web, f.v1, tcp(f.v1))
	f.mustBeHBONE(f.web, f.v1, tcp6(f.v1))
	service := lab.Call{To: f.orders.Addr(lab.PortTCP, false), Size: 50_000}
	f.mustBeHBONE(f.web, f.v1, service)
	for _, call := range []lab.Call{tcp(f.v1), tcp6(f.v1)} {
		f.mustSeeClient(f.web, call)
	}
	f.mustSeeClient(f.web, tcp(f.near))
	if err := f.web.Check(f.ctx); err != nil {
		t.Errorf("CNI CHECK: %v", err)
	}

	f.must(f.Namespace(shop, plain))
	for _, p := range []*lab.Pod{f.web, f.v1} {
		f.awaitEnrolled(p, false)
	}
	f.until(f.web, tcp(f.v1), lab.Answer.OK)
	f.mustBePlain(f.web, tcp(f.v1))
	f.mustBePlain(f.web, tcp6(f.v1))
	if f.web.PID() != pids[0] || f.v1.PID() != pids[1] {
		t.Error("a pod's program is not the same as before")
	}
}

// mustSeeClient wants the server to see the client's own address.
func (f *fixture) mustSeeClient(from *lab.Pod, c lab.Call) {
	f.t.Helper()
	last := f.call(from, c).Last()
	client := from.Addrs[0]
	if strings.HasPrefix(c.To, "[") {
		client = from.Addrs[1]
	}
	if !strings.Contains(last.Seen, client.String()) {
		f.t.Errorf("%s → %s: the server saw %q, want the address %s", from.Name, c.To, last.Seen, client)
	}
}

// TestPodLabelWins takes one pod out of a labelled namespace, and puts one of an unlabelled namespace in.
func TestPodLabelWins(t *testing.T) {
	f := newFixture(t, ambient)
	f.must(f.v2.Label(map[string]string{"app": "orders", "version": "v2", "istio.io/dataplane-mode": "none"}))
	f.awaitEnrolled(f.v2, false)
	f.must(f.legacy.Label(ambient))
	f.awaitEnrolled(f.legacy, true)
	f.until(f.legacy, tcp(f.v1), lab.Answer.OK)
	f.mustBeHBONE(f.legacy, f.v1, tcp(f.v1))
	f.until(f.web, tcp(f.v2), lab.Answer.OK)
	if o := f.observe(f.web, tcp(f.v2), 1); !o.Answer.OK() || o.Wire.Tunnel != 0 || o.Wire.Markers == 0 {
		t.Errorf("a pod that opted out: %s, captured %+v", o.Answer, o.Wire)
	}
}
