package handover

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// taker listens and prepares offers as the test says.
type taker struct {
	socket  string
	events  chan string
	refuse  string
	fds     []int
	stopped chan error
}

func newTaker(t *testing.T, socket string) *taker {
	t.Helper()
	l, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	k := &taker{socket: socket, events: make(chan string, 100), stopped: make(chan error, 10)}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(func() { cancel(); l.Close() })
	go func() {
		for {
			u, err := l.AcceptUnix()
			if err != nil {
				return
			}
			go func() { k.stopped <- Take(ctx, u, k.prepare) }()
		}
	}()
	return k
}

func (k *taker) prepare(value []byte, files []int) (*Prepared, error) {
	if k.refuse != "" {
		return nil, errors.New(k.refuse)
	}
	k.events <- "prepared " + string(value)
	k.fds = files
	return &Prepared{
		Start:   func() { k.events <- "started" },
		Discard: func() { closeAll(files); k.events <- "discarded" },
	}, nil
}

func socketOf(t *testing.T) string { return filepath.Join(t.TempDir(), "s") }

// files are n descriptors of one file.
func files(t *testing.T, n int) (fds []int) {
	t.Helper()
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	for range n {
		fds = append(fds, int(f.Fd()))
	}
	return fds
}

func TestGive(t *testing.T) {
	k := newTaker(t, socketOf(t))
	g, err := Dial(k.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	for _, n := range []int{0, 1, 250, 251, 600} {
		large := strings.Repeat("x", n*1000)
		if err := g.Give(large, files(t, n)); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]string{`prepared "` + large + `"`, "started"}, []string{<-k.events, <-k.events}); diff != "" {
			t.Error(diff)
		}
		if len(k.fds) != n {
			t.Errorf("%d descriptors arrived of %d", len(k.fds), n)
		}
		for _, fd := range k.fds {
			if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
				t.Fatalf("descriptor %d: flags %x, %v", fd, flags, err)
			}
		}
		closeAll(k.fds)
	}
	k.refuse = "no such pod"
	var refused *RefusedError
	if err := g.Give("x", files(t, 1)); !errors.As(err, &refused) || refused.Reason != k.refuse {
		t.Errorf("refused with %v", err)
	}
	k.refuse = ""
	if err := g.Give("y", nil); err != nil {
		t.Errorf("after a refusal: %v", err)
	}
}

// TestBrokenOff: the taker keeps nothing that was not committed, whenever the giver breaks off.
func TestBrokenOff(t *testing.T) {
	k := newTaker(t, socketOf(t))
	g, err := Dial(k.socket)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.c.send(kindOffer, []byte(`1`), files(t, 3)); err != nil {
		t.Fatal(err)
	}
	if err := g.c.answer(); err != nil {
		t.Fatal(err)
	}
	g.Close()
	if diff := cmp.Diff([]string{"prepared 1", "discarded"}, []string{<-k.events, <-k.events}); diff != "" {
		t.Error(diff)
	}
	if err := <-k.stopped; err == nil {
		t.Error("no error")
	}
	// And the giver keeps what its successor did not answer.
	u, err := net.ListenUnix("unix", &net.UnixAddr{Name: k.socket + "2", Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	go func() {
		c, err := u.AcceptUnix()
		if err == nil {
			_ = conn{c}.welcome()
			conn{c}.receive()
			c.Close()
		}
	}()
	if g, err = Dial(k.socket + "2"); err != nil {
		t.Fatal(err)
	}
	if err := g.Give("x", nil); err == nil {
		t.Error("an offer without an answer counts as taken")
	}
}

// TestCommitIsReadWhole: a taker that starts what was committed to it and closes at once has it, and the giver knows.
func TestCommitIsReadWhole(t *testing.T) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socketOf(t), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for range 2000 {
		ours, err := net.DialUnix("unix", nil, l.Addr().(*net.UnixAddr))
		if err != nil {
			t.Fatal(err)
		}
		theirs, err := l.AcceptUnix()
		if err != nil {
			t.Fatal(err)
		}
		read := make(chan error, 1)
		go func() {
			_, err := io.ReadFull(theirs, make([]byte, headerLen))
			theirs.Close()
			read <- err
		}()
		err = conn{ours}.send(kindCommit, nil, nil)
		if readErr := <-read; err != nil || readErr != nil {
			t.Fatalf("the giver: %v, the taker: %v", err, readErr)
		}
		ours.Close()
	}
}

func TestVersions(t *testing.T) {
	k := newTaker(t, socketOf(t))
	u, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: k.socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	var refused *RefusedError
	if err := (&Giver{conn{u}}).greet(Version + 1); !errors.As(err, &refused) || !strings.Contains(refused.Reason, "version") {
		t.Errorf("a later version: %v", err)
	}
	if err := <-k.stopped; err == nil {
		t.Error("no error")
	}
}

// TestName: who listened last has the name, and a former listener does not take it away.
func TestName(t *testing.T) {
	socket := socketOf(t)
	if _, err := Dial(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("nobody there: %v", err)
	}
	first, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	second := newTaker(t, socket)
	first.Close()
	g, err := Dial(socket)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Give(7, nil); err != nil || <-second.events != "prepared 7" {
		t.Error(err)
	}
	info, err := os.Stat(socket)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	alone, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	alone.Close()
	if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the name of a listener that is gone: %v", err)
	}
}

// FuzzTake: whatever comes in place of a giver's messages gives an end, and starts nothing that was not committed.
func FuzzTake(f *testing.F) {
	h, _ := json.Marshal(hello{Version})
	whole := append([]byte{kindHello, 0, 0, 0, 0, 0, 0, 0, byte(len(h))}, h...)
	whole = append(whole, kindOffer, 0, 0, 0, 0, 0, 0, 0, 2, '{', '}', kindCommit, 0, 0, 0, 0, 0, 0, 0, 0)
	f.Add(whole)
	f.Add(append(whole[:len(whole)-9], kindOffer, 0, 0, 0, 1, 0, 0, 0, 1, 'x', 'y'))
	f.Fuzz(func(t *testing.T, in []byte) {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		ours, theirs := os.NewFile(uintptr(pair[0]), "a"), os.NewFile(uintptr(pair[1]), "b")
		u, err := net.FileConn(theirs)
		theirs.Close()
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			ours.Write(in)
			unix.Shutdown(pair[0], unix.SHUT_WR)
		}()
		prepared, ended := 0, 0
		_ = Take(t.Context(), u.(*net.UnixConn), func([]byte, []int) (*Prepared, error) {
			prepared++
			return &Prepared{Start: func() { ended++ }, Discard: func() { ended++ }}, nil
		})
		if prepared != ended {
			t.Errorf("%d offers prepared, %d started or discarded", prepared, ended)
		}
		ours.Close()
	})
}
