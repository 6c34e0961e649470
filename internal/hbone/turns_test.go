package hbone

import (
	"bytes"
	"io"
	mrand "math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/loop"
)

// watchTurns looks at the loops of d between their turns, until the test ends, for an application that has something to
// read and that nothing would ever bring to be read: not on a list, and not waiting for what is still to come. Such a
// stream stands still for ever, but only when nothing else marks it, which a test of the bytes sees once in thousands.
func watchTurns(t testing.TB, d Driver) {
	ld, ok := d.(*LoopDriver)
	if !ok {
		return
	}
	stop := make(chan struct{})
	t.Cleanup(func() { close(stop) })
	go func() {
		for {
			for _, w := range ld.workers {
				w.loop.Post(func() {
					w.loop.Each(func(h loop.Handler) {
						if a, ok := h.(*loopApp); ok {
							if why := a.forgotten(); why != "" {
								t.Errorf("a stream is forgotten: %s", why)
							}
						}
					})
				})
			}
			select {
			case <-stop:
				return
			case <-time.After(200 * time.Microsecond):
			}
		}
	}()
}

// forgotten says why nothing will bring a to be read, "" when something will.
func (a *loopApp) forgotten() string {
	t := a.t
	if a.closed || t.dead {
		return ""
	}
	queued := slices.Contains(a.w.bulk.waiting[a.w.bulk.next:], bulkCarrier(a))
	switch {
	case a.queued != queued:
		return "said to be on the bulk queue and is not, or the reverse"
	case a.reading != slices.Contains(a.w.readApps, a):
		return "said to be on the list of readers and is not, or the reverse"
	case (a.filling || a.draining) && !queued:
		return "has a turn to come that will not"
	case !a.readable || a.outEnd || a.reading || a.filling:
		return ""
	case a.behind:
		if !slices.Contains(t.spaceStreams, a.s) && !a.s.queued && !a.s.blocked {
			return "behind what nothing will send"
		}
	case a.waitsSpace && slices.Contains(t.spaceApps, a):
		if !t.full && !t.dirty {
			return "waits for room that is there"
		}
	case a.waitsWindow && slices.Contains(t.windowApps, a):
		if a.s.window(a.bulk) > 0 {
			return "waits for a window that is open"
		}
	default:
		return "has something to read, and is on no list"
	}
	return ""
}

// TestNoStreamIsForgotten keeps a tunnel full by streams that send much, beside others that send much once and then
// little: these find room that they waited for in the middle of a read that makes them small senders again.
func TestNoStreamIsForgotten(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		m := newMesh(t, client, server)
		m.sendBuffer = 256 << 10
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				c := m.dial('D', 0)
				defer c.Close()
				sum := newSum()
				send := func(n int) {
					p := pattern(i, n)
					sum.Write(p)
					c.Write(p)
				}
				if i%2 == 0 {
					send(40 << 20)
				} else {
					for range 60 {
						send(2 * bulkRead)
						for range 20 {
							time.Sleep(time.Duration(mrand.IntN(400)) * time.Microsecond)
							send(bulkRead / 32)
						}
					}
				}
				c.CloseWrite()
				if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, sum.Sum(nil)) {
					t.Errorf("stream %d: error %v, or other bytes", i, err)
				}
			})
		}
		wg.Wait()
	})
}
