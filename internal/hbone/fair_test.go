package hbone

import (
	"io"
	"net"
	"strconv"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/fairlead-mesh/fairlead/internal/relay"
)

// greedy has much to carry, always.
type greedy struct {
	w      *worker
	served func()
}

func (g *greedy) share() int {
	g.w.bulk.push(g)
	g.served()
	return bulkTurn / 2
}

// TestNoTurnIsLost marks an application as one that sends much and then finds that it sends little, as happens when the
// room that it waited for comes up in the middle of its read: it must be read in its turn, and can be marked again.
func TestNoTurnIsLost(t *testing.T) {
	w := &worker{}
	for _, was := range []bool{false, true} {
		a := &loopApp{w: w, t: &loopTunnel{}, readable: true, behind: true, bulk: was}
		w.markApp(a)
		a.bulk = !was
		for range 2 {
			w.turn()
			if len(w.readApps) > 0 || !w.bulk.empty() {
				t.Fatalf("bulk %v: not served in its turn", was)
			}
			w.markApp(a)
			if len(w.readApps)+len(w.bulk.waiting)-w.bulk.next != 1 {
				t.Fatalf("bulk %v: not on a list after its turn", was)
			}
		}
		w.turn()
	}
}

// TestBulkTakesTurns has a loop of which a hundred want much, all the time: whatever else happens on it waits for no more
// than what fits in one turn, and each of the hundred is served as often as the others.
func TestBulkTakesTurns(t *testing.T) {
	w := newLoops(t, 1).(*LoopDriver).workers[0]
	const many, times, every = 100, 30, 7
	shares, served := 0, [many]int{}
	waited := make(chan int, many*times)
	w.loop.Post(func() {
		for i := range many {
			w.bulk.push(&greedy{w, func() {
				shares++
				served[i]++
				if at := shares; at%every == 0 {
					w.loop.Post(func() { waited <- shares - at })
				}
				if shares == many*times {
					w.bulk = bulkQueue{}
					w.loop.Post(func() { close(waited) })
				}
			}})
		}
	})
	events := 0
	for n := range waited {
		if events++; n > 2 {
			t.Fatalf("an event waited for %d shares of others", n)
		}
	}
	if events != many*times/every {
		t.Errorf("%d events of %d", events, many*times/every)
	}
	for i, n := range served {
		if n != times {
			t.Errorf("number %d was served %d times of %d", i, n, many*times)
		}
	}
}

// TestSmallMessagesPassBulk has an application that sends as much as it can, and a peer that gives no credit: a small
// message of another stream goes out all the same, and with new credit the first goes on.
func TestSmallMessagesPassBulk(t *testing.T) {
	for _, tt := range []struct{ window, spare int }{{65535, 65535 / 8}, {1 << 20, 64 << 10}} {
		t.Run(strconv.Itoa(tt.window), func(t *testing.T) {
			apps := make(chan *net.TCPConn, 8)
			p := newPair(t, Goroutines(), newLoops(t, 1), PoolConfig{}, func(in *Incoming) {
				s, err := in.Accept()
				if err != nil {
					return
				}
				app, far := tcpPair(t)
				s.Relay(far, func(relay.Result) {})
				apps <- app
			})
			r := newRawPeer(t, p)
			r.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 24})
			if tt.window > 65535 {
				r.fr.WriteWindowUpdate(0, uint32(tt.window-65535))
			}
			got := map[uint32]int{} // bytes of DATA by stream
			until := func(id uint32, n int) {
				t.Helper()
				if err := r.frames(func(f http2.Frame) bool {
					if d, ok := f.(*http2.DataFrame); ok {
						got[d.StreamID] += len(d.Data())
						got[0] += len(d.Data())
					}
					return got[id] >= n
				}); err != nil {
					t.Fatalf("after %v: %v", got, err)
				}
			}
			r.connect(1)
			bulk := <-apps
			defer bulk.Close()
			bulk.SetDeadline(time.Now().Add(20 * time.Second))
			go io.Copy(bulk, endless{})
			until(1, tt.window-tt.spare)
			const small = 3
			r.connect(small)
			quiet := <-apps
			defer quiet.Close()
			quiet.Write(make([]byte, 1000))
			until(small, 1000)
			if got[0] != tt.window-tt.spare+1000 {
				t.Errorf("a window of %d bytes: %v", tt.window, got)
			}
			r.fr.WriteWindowUpdate(0, 1<<20)
			until(1, got[1]+1<<20-1000-64<<10)
		})
	}
}

// endless gives zeros.
type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// TestUnderWay checks by how much a link's delay enlarges what may be on its way.
func TestUnderWay(t *testing.T) {
	const second, ms = time.Second, time.Millisecond
	for name, tt := range map[string]struct {
		passed, delay time.Duration // of each time that the whole bound came
		want          int
	}{
		"a short link":              {10 * ms, ms, firstUnderWay},
		"a long link, at its speed": {100 * ms, 90 * ms, connWindow},
		"a long link, hardly used":  {10 * second, 90 * ms, firstUnderWay},
	} {
		p := pace{bound: firstUnderWay}
		now := time.Duration(0)
		for range 10 {
			now += tt.passed
			p.got(p.bound, now, func() time.Duration { return tt.delay })
		}
		if p.bound != tt.want {
			t.Errorf("%s: %d bytes, want %d", name, p.bound, tt.want)
		}
	}
}
