package relay

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/loop"
)

func tcpPair(t testing.TB) (a, b *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	d, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); d.Close() })
	for _, c := range []net.Conn{c, d} {
		c.SetDeadline(time.Now().Add(20 * time.Second))
	}
	return c.(*net.TCPConn), d.(*net.TCPConn)
}

// joined is two applications with a relay between them.
func joined(t testing.TB) (left, right *net.TCPConn, h *Handle, res chan Result) {
	left, a := tcpPair(t)
	b, right := tcpPair(t)
	a.SetDeadline(time.Time{})
	b.SetDeadline(time.Time{})
	res = make(chan Result, 2)
	return left, right, Splice(a, b, func(r Result) { res <- r }), res
}

func result(t *testing.T, res chan Result) Result {
	t.Helper()
	select {
	case r := <-res:
		return r
	case <-time.After(10 * time.Second):
		t.Fatal("the relay does not end")
	}
	return Result{}
}

func TestBytesAndHalfClose(t *testing.T) {
	left, right, _, res := joined(t)
	up, down := make([]byte, 20<<20+1), make([]byte, 7<<20+3)
	rand.Read(up)
	rand.Read(down)
	var wg sync.WaitGroup
	wg.Go(func() { left.Write(up); left.CloseWrite() })
	wg.Go(func() {
		got, err := io.ReadAll(right)
		if err != nil || !bytes.Equal(got, up) {
			t.Errorf("right got %d bytes, %v", len(got), err)
		}
		right.Write(down) // after the left's half close
		right.Close()
	})
	got, err := io.ReadAll(left)
	if err != nil || !bytes.Equal(got, down) {
		t.Errorf("left got %d bytes, %v", len(got), err)
	}
	wg.Wait()
	if r := result(t, res); r != (Result{Sent: 20<<20 + 1, Received: 7<<20 + 3}) {
		t.Errorf("result %+v", r)
	}
}

func TestServerFirstAndLiveCounters(t *testing.T) {
	left, right, h, _ := joined(t)
	right.Write([]byte("hello"))
	b := make([]byte, 5)
	if _, err := io.ReadFull(left, b); err != nil || string(b) != "hello" {
		t.Errorf("got %q, %v", b, err)
	}
	left.Write([]byte("hi"))
	io.ReadFull(right, b[:2])
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		if sent, received := h.Counters(); sent == 2 && received == 5 {
			return
		} else if time.Now().After(end) {
			t.Fatalf("counters %d and %d", sent, received)
		}
	}
}

func TestResetIsPassedOn(t *testing.T) {
	for name, which := range map[string]int{"left": 0, "right": 1} {
		t.Run(name, func(t *testing.T) {
			left, right, _, res := joined(t)
			ends := []*net.TCPConn{left, right}
			ends[which].Write([]byte("x"))
			io.ReadFull(ends[1-which], make([]byte, 1))
			ends[which].SetLinger(0)
			ends[which].Close()
			if _, err := ends[1-which].Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the other end sees %v", err)
			}
			if r := result(t, res); !errors.Is(r.Err, syscall.ECONNRESET) || !r.Reset {
				t.Errorf("result %+v", r)
			}
		})
	}
}

// TestUrgentByte: what follows an urgent byte arrives, at once and after the end, and the byte itself where the socket
// keeps it in line.
func TestUrgentByte(t *testing.T) {
	for name, rest := range map[string]string{"last": "", "amid": "after"} {
		t.Run(name, func(t *testing.T) {
			left, a := tcpPair(t)
			b, right := tcpPair(t)
			a.SetDeadline(time.Time{})
			b.SetDeadline(time.Time{})
			setsockopt(t, a, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1)
			Splice(a, b, func(Result) {})
			got := make([]byte, 7)
			left.Write([]byte("before"))
			io.ReadFull(right, got[:6])
			raw, err := left.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			if err := raw.Control(func(fd uintptr) { err = unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil) }); err != nil {
				t.Fatal(err)
			}
			left.Write([]byte(rest))
			if n, err := io.ReadFull(right, got[:1+len(rest)]); err != nil || string(got[:n]) != "!"+rest {
				t.Errorf("got %q, %v", got[:n], err)
			}
			left.CloseWrite()
			if n, err := right.Read(got); n != 0 || err != io.EOF {
				t.Errorf("then %d bytes, %v", n, err)
			}
		})
	}
}

func setsockopt(t *testing.T, c *net.TCPConn, level, name, value int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var set error
	if err := raw.Control(func(fd uintptr) { set = unix.SetsockoptInt(int(fd), level, name, value) }); err != nil || set != nil {
		t.Fatal(err, set)
	}
}

// TestResetAfterHalfClose: an end that has said all, and is then gone for good, resets the other end while nobody writes.
func TestResetAfterHalfClose(t *testing.T) {
	left, right, _, res := joined(t)
	left.CloseWrite()
	if _, err := right.Read(make([]byte, 1)); err != io.EOF {
		t.Fatal(err)
	}
	left.SetLinger(0)
	left.Close()
	if r := result(t, res); !r.Reset {
		t.Errorf("result %+v", r)
	}
	if _, err := right.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("the other end's next write gives %v", err)
	}
}

// TestResetWhileStalled: the end that sends is reset while the other end, which says nothing, takes nothing.
func TestResetWhileStalled(t *testing.T) {
	for name, which := range map[string]int{"left": 0, "right": 1} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			left, right, h, res := joined(t)
			for _, c := range []*net.TCPConn{left, h.a, h.b, right} { // so that they are full soon
				c.SetReadBuffer(16 << 10)
				c.SetWriteBuffer(16 << 10)
			}
			sender, reader := left, right
			if which == 1 {
				sender, reader = right, left
			}
			sender.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
			if _, err := sender.Write(make([]byte, 32<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatalf("the buffers are not full: %v", err)
			}
			sender.SetLinger(0)
			sender.Close()
			if r := result(t, res); !errors.Is(r.Err, syscall.ECONNRESET) || !r.Reset {
				t.Errorf("result %+v", r)
			}
			if _, err := io.Copy(io.Discard, reader); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the other end sees %v", err)
			}
		})
	}
}

// TestCloseWhileStalled: an end that has closed in both directions is no reset one, although the kernel is done with it
// before the other end has taken all.
func TestCloseWhileStalled(t *testing.T) {
	t.Parallel()
	left, right, h, res := joined(t)
	h.b.SetWriteBuffer(16 << 10)
	right.SetReadBuffer(16 << 10)
	right.CloseWrite()
	if _, err := left.Read(make([]byte, 1)); err != io.EOF {
		t.Fatal(err)
	}
	up := make([]byte, 200<<10)
	rand.Read(up)
	left.Write(up)
	left.Close()
	time.Sleep(2 * patience)
	raw, err := h.a.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	over := false
	if err := raw.Control(func(fd uintptr) { over = loop.Over(int(fd)) }); err != nil || !over {
		t.Errorf("the left's connection is over: %v, %v", over, err)
	}
	if sent, _ := h.Counters(); sent == int64(len(up)) {
		t.Error("nothing stands still")
	}
	got, err := io.ReadAll(right)
	if err != nil || !bytes.Equal(got, up) {
		t.Errorf("right got %d bytes, %v", len(got), err)
	}
	if r := result(t, res); r != (Result{Sent: int64(len(up))}) {
		t.Errorf("result %+v", r)
	}
}

func TestAbort(t *testing.T) {
	left, right, h, res := joined(t)
	left.Write([]byte("abc"))
	io.ReadFull(right, make([]byte, 3))
	cause := errors.New("policy changed")
	h.Abort(cause)
	h.Abort(errors.New("again"))
	for _, c := range []*net.TCPConn{left, right} {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("an end sees %v", err)
		}
	}
	if r := result(t, res); r != (Result{Sent: 3, Err: cause, Reset: true}) {
		t.Errorf("result %+v", r)
	}
}

func BenchmarkSplice(b *testing.B) {
	left, right, _, _ := joined(b)
	buf := make([]byte, 128<<10)
	go io.Copy(io.Discard, struct{ io.Reader }{right})
	b.SetBytes(int64(len(buf)))
	for b.Loop() {
		left.Write(buf)
	}
}
