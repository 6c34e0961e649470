package relay

import (
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/loop"
)

// cross freezes h and makes a relay of it as another process would; one in four goes on where it was instead. It is h
// when h has ended.
func cross(t *testing.T, h *Handle, done func(Result)) (*Handle, bool) {
	t.Helper()
	f, ok := h.Freeze()
	if !ok {
		return h, false
	}
	text, err := json.Marshal(f.State)
	if err != nil {
		t.Fatal(err)
	}
	var st State
	if err := json.Unmarshal(text, &st); err != nil {
		t.Fatal(err)
	}
	var files [2]int
	for i, fd := range f.Files {
		if files[i], err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err != nil {
			t.Fatal(err)
		}
	}
	next, err := Adopt(st, files)
	if err != nil {
		t.Fatal(err)
	}
	if rand.IntN(4) == 0 {
		next.Discard()
		f.Resume()
		return h, true
	}
	f.Moved()
	next.Start(done)
	return next, true
}

// TestHandover moves a relay from handle to handle while it carries bytes both ways at full speed and then half closed.
func TestHandover(t *testing.T) {
	client, a := tcpPair(t)
	b, server := tcpPair(t)
	results := make(chan Result, 10)
	done := func(r Result) { results <- r }
	h := Splice(a, b, done)
	const size = 64 << 20
	seed := [32]byte{7}
	go func() {
		io.CopyN(client, rand.NewChaCha8(seed), size)
		client.CloseWrite()
	}()
	go func() {
		io.Copy(struct{ io.Writer }{server}, struct{ io.Reader }{server})
		server.CloseWrite()
	}()
	compared := make(chan error, 1)
	go func() { compared <- same(client, rand.NewChaCha8(seed), size) }()
	moved := 0
	for on := true; on; moved++ {
		time.Sleep(time.Duration(rand.IntN(2000)) * time.Microsecond)
		h, on = cross(t, h, done)
	}
	if err := <-compared; err != nil {
		t.Error(err)
	}
	if r := <-results; r.Err != nil || r.Sent != size || r.Received != size || len(results) != 0 {
		t.Errorf("%+v, and %d more", r, len(results))
	}
	if moved < 3 {
		t.Errorf("moved %d times", moved)
	}
	t.Logf("moved %d times", moved)
}

// same compares what comes from r with n bytes of want, and wants the end behind them.
func same(r io.Reader, want io.Reader, n int) error {
	x, y := make([]byte, 64<<10), make([]byte, 64<<10)
	for n > 0 {
		k, err := r.Read(x[:min(len(x), n)])
		io.ReadFull(want, y[:k])
		if string(x[:k]) != string(y[:k]) {
			return errors.New("bytes differ")
		}
		if n -= k; err != nil {
			return err
		}
	}
	if _, err := r.Read(x); err != io.EOF {
		return errors.New("no end behind the bytes")
	}
	return nil
}

// TestHandoverOfHeldBytes: bytes that the destination does not take are not lost, and a cut of a frozen relay counts
// where it goes on.
func TestHandoverOfHeldBytes(t *testing.T) {
	for _, cut := range []bool{false, true} {
		client, a := tcpPair(t)
		b, server := tcpPair(t)
		for _, c := range []*net.TCPConn{client, a, b, server} { // so that they are full soon
			c.SetReadBuffer(16 << 10)
			c.SetWriteBuffer(16 << 10)
		}
		results := make(chan Result, 1)
		h := Splice(a, b, func(r Result) { results <- r })
		sent := make(chan int64, 1)
		go func() {
			client.SetWriteDeadline(time.Now().Add(time.Second))
			n, _ := io.Copy(client, rand.NewChaCha8([32]byte{1}))
			client.CloseWrite()
			sent <- n
		}()
		size := <-sent // all buffers are full: the server has not read
		f, ok := h.Freeze()
		if !ok || len(f.State.Up.Held) == 0 {
			t.Fatalf("frozen %v with nothing held", ok)
		}
		if cut {
			h.Abort(errors.New("cut"))
			f.Resume()
			if r := <-results; r.Err == nil || r.Err.Error() != "cut" || !r.Reset {
				t.Errorf("%+v", r)
			}
			if _, err := io.Copy(io.Discard, server); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the server saw %v", err)
			}
			continue
		}
		var files [2]int
		for i, fd := range f.Files {
			files[i], _ = unix.Dup(fd)
		}
		next, err := Adopt(f.State, files)
		if err != nil {
			t.Fatal(err)
		}
		f.Moved()
		next.Start(func(r Result) { results <- r })
		if err := same(server, rand.NewChaCha8([32]byte{1}), int(size)); err != nil {
			t.Error(err)
		}
		server.Close()
		if r := <-results; r.Err != nil || r.Sent != size {
			t.Errorf("%+v, want %d bytes", r, size)
		}
	}
}

// TestCutWhileFreezing: a relay that is cut while Freeze waits for it to stand still ends there, once, with a reset.
func TestCutWhileFreezing(t *testing.T) {
	client, a := tcpPair(t)
	b, server := tcpPair(t)
	results := make(chan Result, 2)
	h := newHandle(a, b)
	h.done = func(r Result) { results <- r }
	h.up.first = []byte("x")
	locked, gate := make(chan struct{}), make(chan struct{})
	raw, err := b.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	go raw.Write(func(uintptr) bool { close(locked); <-gate; return true }) // keeps up from writing, whatever the deadline
	<-locked
	h.run()
	frozen := make(chan bool)
	go func() { _, ok := h.Freeze(); frozen <- ok }()
	for begun := false; !begun; time.Sleep(time.Millisecond) {
		h.mu.Lock()
		begun = h.frozen
		h.mu.Unlock()
	}
	cause := errors.New("policy changed")
	h.Abort(cause)
	close(gate)
	if <-frozen {
		t.Error("frozen, although it was cut")
	}
	for _, c := range []*net.TCPConn{client, server} {
		if _, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("an end sees %v", err)
		}
	}
	if r := result(t, results); r.Err != cause || !r.Reset || len(results) != 0 {
		t.Errorf("%+v, and %d more", r, len(results))
	}
}

// TestResetWhileFreezing: a half closed relay whose silent end is reset while it is frozen either ends where it is, or
// takes the reset along: the successor finds it in the socket.
func TestResetWhileFreezing(t *testing.T) {
	ended, along := 0, 0
	for range 300 {
		client, a := tcpPair(t)
		b, server := tcpPair(t)
		a.SetDeadline(time.Time{})
		b.SetDeadline(time.Time{})
		results := make(chan Result, 2)
		h := Splice(a, b, func(r Result) { results <- r })
		client.CloseWrite()
		if _, err := server.Read(make([]byte, 1)); err != io.EOF {
			t.Fatal(err)
		}
		client.SetLinger(0)
		go client.Close()
		time.Sleep(time.Duration(rand.IntN(60)) * time.Microsecond)
		f, ok := h.Freeze()
		if !ok {
			ended++
			if r := result(t, results); !r.Reset {
				t.Errorf("ended without the reset: %+v", r)
			}
		} else {
			along++
			for !loop.Over(f.Files[0]) { // the reset is under way
				time.Sleep(10 * time.Microsecond)
			}
			if loop.SocketError(f.Files[0]) == 0 {
				t.Error("the reset is lost")
			}
			f.Moved()
		}
		if len(results) != 0 {
			t.Errorf("ended again: %+v", <-results)
		}
		client.Close()
		server.Close()
	}
	t.Logf("%d ended, %d took it along", ended, along)
}

// TestAdoptRefuses what is no pair of TCP connections, and leaves the descriptors to their owner.
func TestAdoptRefuses(t *testing.T) {
	l, err := net.Listen("unix", t.TempDir()+"/socket")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, a := tcpPair(t)
	tcp, err := duplicate(a)
	if err != nil {
		t.Fatal(err)
	}
	file, err := l.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := Adopt(State{}, [2]int{tcp, int(file.Fd())}); err == nil {
		t.Error("adopted")
	}
	if err := unix.Close(tcp); err != nil {
		t.Errorf("the descriptor was taken: %v", err)
	}
}
