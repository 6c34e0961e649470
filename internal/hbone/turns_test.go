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
		m.sendBuffer.Store(256 << 10)
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

// TestRoomForAFrame has control frames, of which a peer decides how many there are, fill a record nearly to its end: an
// application is read into the next one.
func TestRoomForAFrame(t *testing.T) {
	client := newLoops(t, 1)
	m := newMesh(t, client, newLoops(t, 1))
	m.streams = make(chan *Stream, 1)
	c := m.dial('E', 5)
	defer c.Close()
	tunnel := (<-m.streams).t.(*loopTunnel)
	for _, pings := range []int{850, 903, 904, 960, 961, 962, 963} {
		left := make(chan int)
		tunnel.w.loop.Post(func() {
			tunnel.flush()
			for range pings {
				tunnel.m.Ping()
			}
			if !tunnel.room(bulkReserve) {
				left <- -1
				return
			}
			left <- tunnel.recordEnd() - tunnel.fill
		})
		if n := <-left; n < leastFrame {
			t.Errorf("behind %d PINGs there is room for %d bytes", pings, n)
		}
	}
	m.echo(1<<20, false)
}

// TestResetStreamIsNotBlocked resets a stream that waits for a window: the tunnel forgets it.
func TestResetStreamIsNotBlocked(t *testing.T) {
	in := make(chan *Stream, 1)
	p := newPair(t, newLoops(t, 1), newLoops(t, 1), PoolConfig{}, func(i *Incoming) {
		s, err := i.Accept()
		if err != nil {
			t.Error(err)
		}
		in <- s
	})
	s, err := p.open(t.Context(), Request{Authority: "a:1"})
	if err != nil {
		t.Fatal(err)
	}
	wrote := make(chan error)
	go func() { _, err := s.Write(make([]byte, streamWindow+2*sendBuffer)); wrote <- err }()
	tunnel := s.t.(*loopTunnel)
	blocked := func() (n int) {
		counted := make(chan int)
		tunnel.w.loop.Post(func() { counted <- len(tunnel.blocked) })
		return <-counted
	}
	await(t, "the stream waits for its window", func() bool { return blocked() == 1 })
	(<-in).Reset()
	if err := <-wrote; err == nil {
		t.Error("all was written")
	}
	tunnel.w.loop.Post(func() { tunnel.writable(nil) }) // as when the window of the connection opens
	if n := blocked(); n != 0 {
		t.Errorf("%d streams wait for a window", n)
	}
}

// TestWrittenWithTheAnswer has a server write before the loop has sent its answer, while the loop is asked to look at
// another stream anyway.
func TestWrittenWithTheAnswer(t *testing.T) {
	driver := newLoops(t, 1).(*LoopDriver)
	other := make(chan *Stream, 1)
	p := newPair(t, newLoops(t, 1), driver, PoolConfig{}, func(i *Incoming) {
		if i.Authority == "a:1" {
			s, err := i.Accept()
			if err != nil {
				t.Error(err)
			}
			other <- s
			return
		}
		busy, free := make(chan bool), make(chan bool)
		driver.workers[0].loop.Post(func() { close(busy); <-free })
		<-busy
		(<-other).Write([]byte("x"))
		s, err := i.Accept()
		if err != nil {
			t.Error(err)
		}
		s.Write([]byte("hello"))
		s.CloseWrite()
		close(free)
	})
	for _, authority := range []string{"a:1", "a:2"} {
		s, err := p.open(t.Context(), Request{Authority: authority})
		if err != nil {
			t.Fatal(err)
		}
		if authority == "a:1" {
			continue
		}
		s.SetReadDeadline(time.Now().Add(5 * time.Second))
		if got, err := io.ReadAll(s); err != nil || string(got) != "hello" {
			t.Errorf("read %q, %v", got, err)
		}
	}
}
