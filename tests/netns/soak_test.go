package netns

import (
	"context"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/fairlead-mesh/fairlead/tests/netns/lab"
)

// soaked is how long connections come and go.
const soaked = 15 * time.Second

// abuse are the conversations that end in every way there is, and do not take long.
var abuse = []string{
	"echo", "half close by the client", "half close by the server", "reset by the client", "reset by the server",
	"closed with bytes unread", "closed at once", "reset at once", "write after the reader has gone", "short connections",
	"a source port again", "nobody listens",
}

// TestNothingGrows: after connections have been opened, closed, half closed, reset, left idle and refused for a while,
// both proxies hold what they held before: goroutines, descriptors, memory, entries of BPF maps. The control is a look
// while connections are open.
func TestNothingGrows(t *testing.T) {
	f := newFixture(t, ambient)
	for _, name := range abuse {
		if !slices.Contains(lab.Conversations(), name) {
			t.Fatalf("there is no conversation %q", name)
		}
	}
	roads := []road{
		{"between the nodes", f.web, f.v1, false}, {"between the nodes", f.batch, f.v2, true},
		{"on one node", f.web, f.near, false}, {"from outside", f.legacy, f.v2, false},
	}
	f.soak(roads, 0)
	before := f.settled(func([]lab.Usage) bool { return true })
	t.Logf("before: %+v", before)

	const held = 30
	ctx, release := context.WithCancel(f.ctx)
	defer release()
	var open sync.WaitGroup
	for range held {
		open.Go(func() {
			c := tcp(f.v1)
			c.SameConnection, c.Duration, c.Interval = true, time.Minute, 50*time.Millisecond
			if a, err := f.web.Call(ctx, c); err != nil || len(a.Attempts) == 0 {
				t.Errorf("a connection that is held open: %s, %v", a, err)
			}
		})
	}
	f.settled(func(now []lab.Usage) bool {
		return now[0].Descriptors >= before[0].Descriptors+held && now[1].Descriptors >= before[1].Descriptors+held
	})
	release()
	open.Wait()

	rounds := f.soak(roads, soaked)
	after := f.settled(func(now []lab.Usage) bool {
		return !slices.ContainsFunc([]int{0, 1}, func(i int) bool { return grown(before[i], now[i]) })
	})
	t.Logf("after %d conversations: %+v", rounds, after)
}

// grown tells whether a proxy holds more than before. A tunnel more or less is the moment's, as is some of the heap.
func grown(before, now lab.Usage) bool {
	return now.Goroutines > before.Goroutines+8 || now.Descriptors > before.Descriptors+4 ||
		now.Heap > before.Heap*1.25+(4<<20) || !maps.Equal(now.Entries, before.Entries)
}

// soak holds all conversations on all roads, over and over for that long but once at least, and counts them.
func (f *fixture) soak(roads []road, d time.Duration) int {
	f.t.Helper()
	var mu sync.Mutex
	var n int
	var all sync.WaitGroup
	began := time.Now()
	for i, r := range roads {
		for _, name := range abuse {
			if slices.ContainsFunc(roads[:i], func(o road) bool { return o.to == r.to }) {
				continue // a server tells one client at a time what it saw
			}
			all.Go(func() {
				for first := true; first || time.Since(began) < d; first = false {
					if _, _, err := r.from.Converse(f.ctx, r.to, r.v6, name); err != nil {
						f.t.Errorf("%s: %s: %v", r.name, name, err)
						return
					}
					mu.Lock()
					n++
					mu.Unlock()
				}
			})
		}
	}
	all.Wait()
	return n
}

// settled looks at what both proxies hold until it is as wanted.
func (f *fixture) settled(wanted func([]lab.Usage) bool) []lab.Usage {
	f.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		var now []lab.Usage
		for _, n := range f.Nodes {
			u, err := n.Usage(f.ctx)
			f.must(err)
			now = append(now, u)
		}
		if wanted(now) {
			return now
		}
		if time.Now().After(deadline) {
			f.t.Errorf("not as wanted after 30 s: %+v", now)
			return now
		}
	}
}

// TestBulkLeavesOthersTheirTurn: while one pod moves all it can over many connections, another's ping-pong over the same
// two proxies goes on. The figures are printed; what is required is that every exchange comes back.
func TestBulkLeavesOthersTheirTurn(t *testing.T) {
	f := newFixture(t, ambient)
	ping := lab.Call{To: f.v2.Addr(lab.PortTCP, false), Size: 64, SameConnection: true, Count: 300, Interval: time.Millisecond}
	quiet := f.call(f.batch, ping)
	ctx, stop := context.WithCancel(f.ctx)
	defer stop()
	var bulk sync.WaitGroup
	var mu sync.Mutex
	var moved int
	for range 32 {
		bulk.Go(func() {
			c := lab.Call{To: f.v1.Addr(lab.PortTCP, false), Size: 8 << 20, SameConnection: true, Duration: time.Minute, Timeout: 30 * time.Second}
			a, err := f.web.Call(ctx, c)
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			moved += len(a.Attempts)
			mu.Unlock()
		})
	}
	time.Sleep(time.Second) // until windows and buffers are full
	beside := f.call(f.batch, ping)
	stop()
	bulk.Wait()
	for name, a := range map[string]lab.Answer{"alone": quiet, "beside 32 bulk connections": beside} {
		if !a.OK() || len(a.Attempts) != ping.Count {
			t.Errorf("%s: %d exchanges: %s", name, len(a.Attempts), a)
			continue
		}
		took := make([]time.Duration, 0, len(a.Attempts))
		for _, at := range a.Attempts {
			took = append(took, at.Took)
		}
		slices.Sort(took)
		t.Logf("%s: p50 %v, p99 %v, longest %v", name, took[len(took)/2], took[len(took)*99/100], took[len(took)-1])
	}
	t.Logf("bulk: %d exchanges of 8 MiB each way", moved)
}
