package netns

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/fairlead-mesh/fairlead/tests/netns/lab"
)

// long is a connection that is open while something happens to the proxies.
type long struct {
	name   string
	call   lab.Call
	answer lab.Answer
}

// open begins connections of three kinds (bulk, ping-pong, idle between two exchanges) on each way through the mesh:
// over a tunnel, within the node, and in clear out of it. Every exchange compares what comes back. end ends and joins them.
func (f *fixture) open(idle time.Duration) (all []*long, end func()) {
	ctx, stop := context.WithCancel(f.ctx)
	var running sync.WaitGroup
	for way, to := range map[string]*lab.Pod{"tunnel": f.v1, "same node": f.near, "plain": f.legacy} {
		for kind, c := range map[string]lab.Call{
			"bulk":      {Size: 1 << 20, Duration: time.Minute, Timeout: 30 * time.Second},
			"ping-pong": {Size: 64, Duration: time.Minute, Interval: 5 * time.Millisecond, Timeout: 10 * time.Second},
			"idle":      {Size: 5000, Count: 2, Interval: idle, Timeout: 10 * time.Second},
		} {
			c.To, c.SameConnection = to.Addr(lab.PortTCP, false), true
			l := &long{name: way + ", " + kind, call: c}
			all = append(all, l)
			running.Go(func() {
				var err error
				callCtx := ctx
				if kind == "idle" {
					callCtx = f.ctx
				}
				if l.answer, err = f.web.Call(callCtx, c); err != nil {
					f.t.Error(err)
				}
			})
		}
	}
	return all, func() { stop(); running.Wait() }
}

// TestUpgrade: the proxies of both nodes are replaced one after the other. What is open goes on, byte for byte; no connect
// fails; each connection leaves one line on each side, with all its bytes.
func TestUpgrade(t *testing.T) {
	f := newFixture(t, ambient)
	position := f.Position()
	connections, end := f.open(15 * time.Second)
	ctx, stop := context.WithCancel(f.ctx)
	defer stop()
	loads := make(chan lab.Answer, 3)
	for _, to := range []*lab.Pod{f.v1, f.near, f.legacy} {
		go func() {
			c := lab.Call{To: to.Addr(lab.PortTCP, false), Size: 100, Duration: time.Minute, Timeout: 10 * time.Second}
			a, err := f.batch.Call(ctx, c)
			if err != nil {
				t.Error(err)
			}
			loads <- a
		}()
	}
	time.Sleep(500 * time.Millisecond)
	for _, n := range f.Nodes {
		began := time.Now()
		f.must(n.ReplaceZtunnel(f.ctx))
		t.Logf("%s: replaced in %v", n.Name, time.Since(began))
	}
	time.Sleep(500 * time.Millisecond)
	stop()
	connects := 0
	for range cap(loads) {
		a := <-loads
		for i, attempt := range a.Attempts {
			if !attempt.OK() && i < len(a.Attempts)-1 { // the last may have been ended by stop
				t.Errorf("connect %d of %d: %s", i, len(a.Attempts), attempt.Error)
			}
		}
		connects += len(a.Attempts)
	}
	end()
	for _, l := range connections {
		if !l.answer.OK() {
			t.Errorf("%s: %s", l.name, l.answer)
		}
	}
	t.Logf("%d connects", connects)
	if connects < 500 {
		t.Errorf("only %d connects while the proxies were replaced", connects)
	}
	f.wantWholeLines(position, connections)
}

// wantWholeLines wants each connection's outbound line once, with as many bytes as its exchanges had.
func (f *fixture) wantWholeLines(position lab.Position, connections []*long) {
	f.t.Helper()
	lines := map[string][]lab.Connection{}
	_, err := f.WaitConnections(f.ctx, position, func(all []lab.Connection) bool {
		clear(lines)
		for _, c := range all {
			if c.Direction == "outbound" {
				lines[c.Source] = append(lines[c.Source], c)
			}
		}
		return !slices.ContainsFunc(connections, func(l *long) bool { return len(lines[l.answer.Last().Local]) == 0 })
	})
	f.must(err)
	for _, l := range connections {
		own := lines[l.answer.Last().Local]
		carried := int64(len(l.answer.Attempts) * l.call.Size)
		if len(own) != 1 || own[0].Sent < carried || own[0].Received < carried || own[0].Flags != "-" {
			f.t.Errorf("%s: lines %+v, want one with %d bytes and more each way", l.name, own, carried)
		}
	}
}

// TestUpgradeControl: the same connections are cut when a proxy is killed instead.
func TestUpgradeControl(t *testing.T) {
	f := newFixture(t, ambient)
	connections, end := f.open(3 * time.Second)
	time.Sleep(500 * time.Millisecond)
	f.Nodes[0].KillZtunnel()
	f.must(f.Nodes[0].StartZtunnel(f.ctx))
	time.Sleep(500 * time.Millisecond)
	end()
	for _, l := range connections {
		if l.answer.OK() || l.answer.Failed() {
			t.Errorf("%s: %s, want it to have worked and been cut", l.name, l.answer)
		}
	}
}

// connectsDuringUpgrades is how many connects a test makes each way; docs/upgrades.md tells of a run with 100,000.
const connectsDuringUpgrades = 2000

// TestConnectsDuringUpgrades counts connects while the proxy of the client's node is replaced again and again.
func TestConnectsDuringUpgrades(t *testing.T) {
	f := newFixture(t, ambient)
	for _, to := range []*lab.Pod{f.v1, f.near} {
		f.wantEveryConnect(to, func() { f.must(f.Nodes[0].ReplaceZtunnel(f.ctx)) })
	}
}

// TestConnectsDuringAgentUpgrades counts connects while the agents of both nodes, and with them the programs in the kernel, are
// replaced again and again, and with each the redirection of both pods: their maps, their rules, their chains.
func TestConnectsDuringAgentUpgrades(t *testing.T) {
	f := newFixture(t, ambient)
	ends := map[*lab.Node]*lab.Pod{f.Nodes[0]: f.web, f.Nodes[1]: f.v1}
	round := 0
	for _, to := range []*lab.Pod{f.v1, f.near} {
		f.wantEveryConnect(to, func() {
			round++
			for n, p := range ends {
				n.KillAgent()
				f.must(n.StartAgent(f.ctx))
				port := uint16(20000 + round)
				if excluded, err := n.Excludes(p, port); err != nil || excluded {
					t.Fatalf("control: port %d is excluded before it was asked for: %v, %v", port, excluded, err)
				}
				text := fmt.Sprint(port)
				f.must(p.Annotate(map[string]string{"traffic.sidecar.istio.io/excludeOutboundPorts": text, "traffic.sidecar.istio.io/excludeInboundPorts": text}))
				f.awaitExclusion(n, p, port)
			}
		})
	}
}

// awaitExclusion waits until an agent has redirected a pod anew, with that exclusion in the place of another.
func (f *fixture) awaitExclusion(n *lab.Node, p *lab.Pod, port uint16) {
	f.t.Helper()
	for {
		excluded, err := n.Excludes(p, port)
		f.must(err)
		if excluded {
			return
		}
		select {
		case <-f.ctx.Done():
			f.t.Fatalf("the agent of %s does not exclude port %d of %s", n.Name, port, p.Name)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// wantEveryConnect connects from web to a pod while replace is called, one call after the other, and wants none to fail.
func (f *fixture) wantEveryConnect(to *lab.Pod, replace func()) {
	f.t.Helper()
	done := make(chan lab.Answer, 1)
	go func() {
		c := lab.Call{To: to.Addr(lab.PortTCP, false), Size: 10, Count: connectsDuringUpgrades, Timeout: 10 * time.Second}
		a, err := f.web.Call(f.ctx, c)
		if err != nil {
			f.t.Error(err)
		}
		done <- a
	}()
	var a lab.Answer
	replaced := 0
	for len(a.Attempts) == 0 {
		replace()
		replaced++
		select {
		case a = <-done:
		default:
		}
	}
	failed := 0
	for i, attempt := range a.Attempts {
		if !attempt.OK() {
			if failed++; failed < 5 {
				f.t.Errorf("%s, connect %d: %s", to.Name, i, attempt.Error)
			}
		}
	}
	f.t.Logf("%s: %d connects, %d failed, during %d replacements", to.Name, len(a.Attempts), failed, replaced)
	if len(a.Attempts) != connectsDuringUpgrades {
		f.t.Errorf("%s: %d connects, want %d", to.Name, len(a.Attempts), connectsDuringUpgrades)
	}
}
