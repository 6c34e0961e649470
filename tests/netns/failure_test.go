package netns

import (
	"context"
	"testing"
	"time"

	"github.com/fairlead-mesh/fairlead/tests/netns/lab"
)

// TestZtunnelKilled: the proxy dies under load. Nothing leaves in clear, calls fail at once, and new ones work within a
// second of its return.
func TestZtunnelKilled(t *testing.T) {
	f := newFixture(t, ambient)
	before, err := f.Wire.Total()
	f.must(err)
	ctx, stop := context.WithCancel(f.ctx)
	defer stop()
	load := make(chan lab.Answer, 2)
	for _, to := range []*lab.Pod{f.v1, f.near} {
		go func() {
			c := tcp(to)
			c.Duration, c.Interval, c.Timeout = time.Minute, 2*time.Millisecond, 500*time.Millisecond
			a, err := f.web.Call(ctx, c)
			if err != nil {
				t.Error(err)
			}
			load <- a
		}()
	}
	time.Sleep(300 * time.Millisecond)

	killed := time.Now()
	f.Nodes[0].KillZtunnel()
	if a := f.call(f.web, tcp(f.v1)); !a.Last().Refused || a.Last().Took > 100*time.Millisecond {
		t.Errorf("without a proxy: %s after %v, want it refused at once", a, a.Last().Took)
	}
	f.mustFail(f.v1, tcp(f.web))
	f.mustFail(f.legacy, tcp(f.web))
	time.Sleep(300 * time.Millisecond)
	f.must(f.Nodes[0].StartZtunnel(f.ctx))
	returned := time.Now()
	f.until(f.web, tcp(f.v1), lab.Answer.OK)
	f.until(f.web, tcp(f.near), lab.Answer.OK)
	time.Sleep(200 * time.Millisecond)
	stop()
	for range 2 {
		f.judgeLoad(<-load, killed, returned)
	}
	seen, err := f.Wire.Since(before)
	f.must(err)
	if seen.Markers != 0 || seen.Clear != 0 || seen.Tunnel == 0 {
		t.Errorf("captured %+v, want all in tunnels", seen)
	}
}

// judgeLoad wants a load to have succeeded before and after, and failed in between.
func (f *fixture) judgeLoad(a lab.Answer, killed, returned time.Time) {
	f.t.Helper()
	var before, between, after int
	for _, attempt := range a.Attempts {
		switch end := attempt.Start.Add(attempt.Took); {
		case end.Before(killed):
			if before++; !attempt.OK() {
				f.t.Errorf("before the kill: %s", attempt.Error)
			}
		case attempt.Start.After(killed) && end.Before(returned.Add(-100*time.Millisecond)) && attempt.OK():
			between++
		case attempt.Start.After(returned.Add(time.Second)) || attempt.Start.After(returned) && attempt.OK():
			if after++; !attempt.OK() {
				f.t.Errorf("%v after the proxy's return: %s", attempt.Start.Sub(returned), attempt.Error)
			}
		}
	}
	// The proxy answers a moment before the lab sees that it is ready.
	if before < 20 || after < 5 {
		f.t.Errorf("load: %d before, %d while the proxy was away, %d after its return", before, between, after)
	}
}

// TestPodsWaitForTheMesh: a pod of the mesh cannot start outside it, and others do not wait.
func TestPodsWaitForTheMesh(t *testing.T) {
	f := newFixture(t, ambient)
	f.Nodes[0].KillZtunnel()
	if p, err := f.Pod(f.ctx, lab.PodSpec{Namespace: shop, Name: "early"}); err == nil {
		t.Errorf("CNI ADD of pod %s succeeded without a proxy", p.Name)
	} else {
		t.Logf("as it must be: %v", err)
	}
	f.pod(lab.PodSpec{Namespace: outside, Name: "other"})

	f.must(f.Nodes[0].StartZtunnel(f.ctx))
	late := f.pod(lab.PodSpec{Namespace: shop, Name: "late"})
	if !late.Enrolled(f.ctx) {
		t.Error("a pod has started outside of the mesh")
	}
	f.until(late, tcp(f.v1), lab.Answer.OK)
	f.mustBeHBONE(late, f.v1, tcp(f.v1))
}

// TestAgentAndControlPlaneAway: neither is needed for what runs.
func TestAgentAndControlPlaneAway(t *testing.T) {
	f := newFixture(t, ambient)
	f.Nodes[0].KillAgent()
	f.must(f.StopIstiod())
	f.mustBeHBONE(f.web, f.v1, tcp(f.v1))
	f.mustBeHBONE(f.web, f.v1, tcp6(f.v1))
	f.mustAnswer(f.web, tcp(f.near))

	f.must(f.StartIstiod(f.ctx))
	f.must(f.Nodes[0].StartAgent(f.ctx))
	f.mustBeHBONE(f.web, f.v1, tcp(f.v1))
	p := f.pod(lab.PodSpec{Namespace: shop, Name: "new"})
	deadline, cancel := context.WithTimeout(f.ctx, 30*time.Second)
	defer cancel()
	// The proxies come back to the control plane with a delay that grows while it is away.
	for !f.call(p, tcp(f.v1)).OK() {
		if deadline.Err() != nil {
			t.Fatal("a pod made after the control plane's return does not reach others")
		}
		time.Sleep(100 * time.Millisecond)
	}
	f.mustBeHBONE(p, f.v1, tcp(f.v1))
}
