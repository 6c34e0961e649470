package netns_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/netns"
)

func newBeginner(t *testing.T) *netns.Beginner {
	t.Helper()
	b, err := netns.NewBeginner()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

// cookie is that of a network namespace, or of this process's (nil).
func cookie(t *testing.T, ns *os.File) uint64 {
	t.Helper()
	c, err := netns.Cookie(ns)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestBeginInsideANamespace(t *testing.T) {
	ns, b := newNetns(t), newBeginner(t)
	home := cookie(t, nil)
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := netns.Listen(ns, "tcp", netip.MustParseAddrPort(addr), netns.ProxyMark, false)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		dst := l.Addr().(*net.TCPAddr).AddrPort()
		if _, _, err := b.Begin(nil, netns.DialOptions{}, dst); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("begin outside the namespace: %v, want ECONNREFUSED", err)
		}
		fd, pending, err := b.Begin(ns, netns.DialOptions{Mark: netns.ProxyMark}, dst)
		if err != nil {
			t.Fatal(err)
		}
		if pending {
			if fd, err = b.Finish(t.Context(), fd, dst); err != nil {
				t.Fatal(err)
			}
		}
		peer, err := l.AcceptTCP()
		if err != nil {
			t.Fatal(err)
		}
		defer peer.Close()
		file := os.NewFile(uintptr(fd), "begun")
		conn, err := net.FileConn(file)
		file.Close()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		exchange(t, conn, peer)
		if mark := sockopt(t, conn.(*net.TCPConn), unix.SOL_SOCKET, unix.SO_MARK); mark != int(netns.ProxyMark) {
			t.Errorf("begun connection has mark %#x", mark)
		}
	}
	if now, err := netns.Cookie(nil); err != nil || now != home {
		t.Errorf("this process is in namespace %d, was in %d (%v)", now, home, err)
	}
}

// The listener's queue is full, so that the kernel answers no more SYNs: the connection stays pending.
func TestBegunConnectionIsFinishedLater(t *testing.T) {
	ns, b := newNetns(t), newBeginner(t)
	var listener int
	var dst netip.AddrPort
	err := netns.Do(ns, func() (err error) {
		if listener, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0); err != nil {
			return err
		}
		if err := unix.Bind(listener, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
			return err
		}
		sa, err := unix.Getsockname(listener)
		if err != nil {
			return err
		}
		dst = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(sa.(*unix.SockaddrInet4).Port))
		return unix.Listen(listener, 0)
	})
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(listener)
	var waiting []int
	for len(waiting) < 8 {
		fd, pending, err := b.Begin(ns, netns.DialOptions{}, dst)
		if err != nil {
			t.Fatal(err)
		}
		if pending {
			waiting = append(waiting, fd)
			break
		}
		defer unix.Close(fd)
	}
	if len(waiting) == 0 {
		t.Fatal("no connection is pending")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := b.Finish(ctx, waiting[0], dst); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v, want the context's", err)
	}
}

// TestThreadThatCannotGoBack: the caller gets an error, nothing else runs on the thread, and the next call brings it home.
func TestThreadThatCannotGoBack(t *testing.T) {
	ns, b := newNetns(t), newBeginner(t)
	home := cookie(t, nil)
	inside := cookie(t, ns)
	if home == inside {
		t.Fatal("the namespace is this one")
	}
	l, err := netns.Listen(ns, "tcp", netip.MustParseAddrPort("127.0.0.1:0"), netns.ProxyMark, false)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dst := l.Addr().(*net.TCPAddr).AddrPort()
	nowhere, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer nowhere.Close()
	done := make(chan struct{})
	go func() { // of its own, as it holds on to its thread
		defer close(done)
		way := b.SetHome(nowhere)
		for range 2 {
			if fd, _, err := b.Begin(ns, netns.DialOptions{}, dst); err == nil || fd != -1 {
				t.Errorf("descriptor %d, %v, although there was no way back", fd, err)
			}
			if at, err := netns.Cookie(nil); err != nil || at != inside {
				t.Errorf("the thread is in %d, %v, want %d: this test shows nothing", at, err, inside)
			}
		}
		b.SetHome(way)
		fd, _, err := b.Begin(ns, netns.DialOptions{}, dst)
		if err != nil {
			t.Error(err)
			return
		}
		unix.Close(fd)
		if at, err := netns.Cookie(nil); err != nil || at != home {
			t.Errorf("the thread is in %d, %v, want %d", at, err, home)
		}
	}()
	<-done
}
