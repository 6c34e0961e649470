package loop

import (
	"net"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// sink reads all there is and says so.
type sink struct {
	l    *Loop
	fd   int
	got  chan string
	ends chan uint32
}

func (s *sink) Ready(events uint32) {
	var b [100]byte
	for {
		n, errno := Read(s.fd, b[:])
		if errno == syscall.EAGAIN {
			return
		}
		if errno != 0 || n == 0 {
			s.l.Close(s.fd)
			s.ends <- events
			return
		}
		s.got <- string(b[:n])
	}
}

func receive[T any](t *testing.T, ch chan T) (v T) {
	t.Helper()
	select {
	case v = <-ch:
	case <-time.After(5 * time.Second):
		t.Fatal("nothing in 5 s")
	}
	return v
}

func newLoop(t *testing.T, turn func() bool) *Loop {
	t.Helper()
	if turn == nil {
		turn = func() bool { return false }
	}
	l, err := New(turn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Stop)
	return l
}

func TestEventsOfADetachedSocket(t *testing.T) {
	l := newLoop(t, nil)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	peer, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	fd, err := Detach(c.(*net.TCPConn))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("x")); err == nil {
		t.Error("the net.Conn is still of use after Detach")
	}
	peer.Write([]byte("before"))
	s := &sink{l: l, fd: fd, got: make(chan string, 10), ends: make(chan uint32, 10)}
	l.Post(func() {
		if err := l.Add(fd, s); err != nil {
			t.Error(err)
		}
	})
	if got := receive(t, s.got); got != "before" {
		t.Errorf("got %q", got)
	}
	peer.Write([]byte("after"))
	if got := receive(t, s.got); got != "after" {
		t.Errorf("got %q", got)
	}
	peer.Close()
	if events := receive(t, s.ends); events&Hangup == 0 {
		t.Errorf("events at the end %x", events)
	}
	if err := l.Add(-1, s); err == nil {
		t.Error("a descriptor that is none was added")
	}
}

func TestPostsWakeAndKeepOrder(t *testing.T) {
	var turns atomic.Int64
	l := newLoop(t, func() bool { turns.Add(1); return false })
	const each = 20000
	order := make(chan int, 4)
	for range 4 {
		go func() {
			last := -1
			for i := range each {
				l.Post(func() {
					if i != last+1 {
						t.Errorf("post %d after %d", i, last)
					}
					if last = i; i == each-1 {
						order <- i
					}
				})
			}
		}()
	}
	for range 4 {
		receive(t, order)
	}
	time.Sleep(50 * time.Millisecond)
	before := turns.Load()
	time.Sleep(50 * time.Millisecond)
	if n := turns.Load() - before; n != 0 {
		t.Errorf("%d turns of an idle loop", n)
	}
	l.Stop()
	for end := time.Now().Add(5 * time.Second); l.Post(func() {}); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("posts are still taken after Stop")
		}
	}
}

// TestPostsBesideStop: what Post has said yes to runs, also while Stop's own post waits for its turn.
func TestPostsBesideStop(t *testing.T) {
	l := newLoop(t, nil)
	reached, goOn, ran := make(chan int), make(chan struct{}), make(chan int, 1)
	pause := func() { reached <- 0; <-goOn }
	l.Post(pause)
	receive(t, reached)
	l.Post(pause) // in one batch with Stop's
	l.Stop()
	goOn <- struct{}{}
	receive(t, reached)
	if !l.Post(func() { ran <- 0 }) {
		t.Error("the loop takes no post and is not stopped yet")
	}
	close(goOn)
	receive(t, ran)
	for end := time.Now().Add(5 * time.Second); l.Post(func() {}); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("posts are still taken")
		}
	}
}

func TestTurnIsRepeatedWhileThereIsMore(t *testing.T) {
	left := 5
	done := make(chan struct{})
	l := newLoop(t, func() bool {
		if left == 0 {
			return false
		}
		if left--; left == 0 {
			close(done)
		}
		return left > 0
	})
	l.Post(func() {})
	receive(t, done)
}

// stale closes the other descriptor of its batch and puts a new one in its place, which must not get the old one's event.
type stale struct {
	l     *Loop
	other *stale
	fd    int
	calls atomic.Int64
	fresh *stale
}

func (s *stale) Ready(uint32) {
	s.calls.Add(1)
	if s.other == nil || s.other.fd < 0 {
		return
	}
	old := s.other.fd
	s.other.fd = -1
	s.l.Close(old)
	fd, _ := unix.Eventfd(0, unix.EFD_NONBLOCK)
	if fd != old {
		unix.Dup3(fd, old, 0)
		unix.Close(fd)
	}
	s.fresh.fd = old
	s.l.Add(old, s.fresh)
}

func TestEventOfAReusedDescriptor(t *testing.T) {
	l := newLoop(t, nil)
	a, _ := unix.Eventfd(1, unix.EFD_NONBLOCK) // readable from the start
	b, _ := unix.Eventfd(1, unix.EFD_NONBLOCK)
	fresh := &stale{l: l}
	x, y := &stale{l: l, fd: a, fresh: fresh}, &stale{l: l, fd: b, fresh: fresh}
	x.other, y.other = y, x
	done := make(chan struct{})
	l.Post(func() { l.Add(a, x); l.Add(b, y) })
	time.Sleep(50 * time.Millisecond)
	l.Post(func() { close(done) })
	receive(t, done)
	// An eventfd at zero is writable, so its own first event comes once; the stale event would be a second one.
	if n := x.calls.Load() + y.calls.Load(); n != 1 || fresh.calls.Load() != 1 {
		t.Errorf("%d calls of the old handlers, %d of the new one, want 1 and 1", n, fresh.calls.Load())
	}
}

func TestVectors(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	a, b, c := []byte("one"), []byte("two"), make([]byte, 4)
	v := []unix.Iovec{{Base: &a[0]}, {Base: &b[0]}}
	v[0].SetLen(3)
	v[1].SetLen(3)
	if n, errno := Writev(fds[0], v); n != 6 || errno != 0 {
		t.Fatal(n, errno)
	}
	d := make([]byte, 4)
	v = []unix.Iovec{{Base: &c[0]}, {Base: &d[0]}}
	v[0].SetLen(4)
	v[1].SetLen(4)
	if n, errno := Readv(fds[1], v); n != 6 || errno != 0 || string(c)+string(d[:2]) != "onetwo" {
		t.Fatal(n, errno, c, d)
	}
	if _, errno := Read(fds[1], c); errno != syscall.EAGAIN {
		t.Error(errno)
	}
	unix.Close(fds[1])
	if _, errno := Write(fds[0], a); errno != syscall.EPIPE { // and no SIGPIPE
		t.Error(errno)
	}
}
