// Package netns (plumbing) makes sockets inside the network namespace of a pod, from a process that lives in another.
//
// A socket belongs for ever to the namespace it was made in, so only the socket(2) call needs a thread that has
// entered the namespace; binding, connecting, waiting and copying happen on ordinary goroutines afterwards.
package netns

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Socket marks that redirection gives a meaning to, in a pod's network namespace.
const (
	// ProxyMark is on the node proxy's sockets (SO_MARK) towards other nodes, and with rules that rewrite addresses on
	// all of them, as other node proxies and agents expect it.
	ProxyMark uint32 = 0x539
	// ProxyMarkMask tells which bits of a socket's mark are compared with ProxyMark.
	ProxyMarkMask uint32 = 0xfff
	// RedirectMark makes the pod's routing deliver a packet locally (device lo) whatever its destination is. The
	// application's sockets carry it, and the proxy's towards the application: those accepted from it, and those that keep
	// the client's address as their source. What the kernel answers without a live socket, an ACK in TIME-WAIT or a RST,
	// has the mark of the packet that it answers (fwmark_reflect), so both ends must carry it.
	RedirectMark uint32 = 0x53a
)

// Open opens a network namespace by its file, as /var/run/netns/NAME or /proc/PID/ns/net, and refuses a file that is
// not a network namespace.
func Open(path string) (*os.File, error) {
	// Non-blocking, for a path that turns out to be a pipe.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open network namespace", Path: path, Err: err}
	}
	ns := os.NewFile(uintptr(fd), path)
	if err := Check(ns); err != nil {
		ns.Close()
		return nil, err
	}
	return ns, nil
}

// New makes a network namespace that lives as long as the file, or something else that refers to it, is open. Its only
// interface is lo, and that is down.
func New() (*os.File, error) {
	type result struct {
		ns  *os.File
		err error
	}
	done := make(chan result, 1)
	go func() {
		// Never unlocked: the thread ends with this goroutine, in the new namespace.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- result{nil, os.NewSyscallError("unshare network namespace", err)}
			return
		}
		ns, err := Open("/proc/thread-self/ns/net")
		done <- result{ns, err}
	}()
	r := <-done
	return r.ns, r.err
}

// Check returns an error unless ns refers to a network namespace. It is for files that come from another process.
func Check(ns *os.File) error {
	kind, err := control(ns, func(fd int) (int, error) { return unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE) })
	if err != nil {
		return fmt.Errorf("%s is not a namespace: %w", ns.Name(), err)
	}
	if kind != unix.CLONE_NEWNET {
		return fmt.Errorf("%s is a namespace of another kind than network", ns.Name())
	}
	return nil
}

// Do runs f on a thread that has entered ns, and waits for it. A nil ns means the process's own network namespace. f
// must not start goroutines that count on the namespace: they run on other threads.
func Do(ns *os.File, f func() error) error {
	if ns == nil {
		return f()
	}
	done := make(chan error, 1)
	go func() { done <- enter(ns, f) }()
	return <-done
}

// enter runs f inside ns on the calling goroutine's thread. The thread is given back to the Go runtime only when it
// has returned to its own namespace; otherwise it stays locked and ends with the goroutine.
func enter(ns *os.File, f func() error) (err error) {
	runtime.LockOSThread()
	home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open this thread's network namespace: %w", err)
	}
	defer unix.Close(home)
	_, err = control(ns, func(fd int) (int, error) { return 0, unix.Setns(fd, unix.CLONE_NEWNET) })
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace %s: %w", ns.Name(), err)
	}
	defer func() {
		if unix.Setns(home, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
	}()
	return f()
}

// Cookie returns the number by which the kernel knows the network namespace for as long as it exists; no other
// namespace gets it before the next boot (SO_NETNS_COOKIE, Linux 5.14; before that it is the namespace's inode, which may
// come back once the namespace is gone). A nil ns means the process's own.
func Cookie(ns *os.File) (uint64, error) {
	var cookie uint64
	err := Do(ns, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("make a socket: %w", err)
		}
		defer unix.Close(fd)
		cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		if errors.Is(err, unix.ENOPROTOOPT) {
			cookie, err = inode("/proc/thread-self/ns/net")
		}
		if err != nil {
			return fmt.Errorf("read the network namespace's cookie: %w", err)
		}
		return nil
	})
	return cookie, err
}

// inode is the number of a file, that of a namespace here.
func inode(path string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, err
	}
	return st.Ino, nil
}

// Same tells whether two files refer to the same namespace.
func Same(a, b *os.File) (bool, error) {
	ai, err := a.Stat()
	if err != nil {
		return false, err
	}
	bi, err := b.Stat()
	if err != nil {
		return false, err
	}
	return os.SameFile(ai, bi), nil
}

// control calls f with the file's descriptor, which stays open meanwhile. File.Fd is not used because it would make a
// file that waits in the poller a blocking one.
func control(f *os.File, call func(fd int) (int, error)) (int, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	var n int
	var callErr error
	if err := raw.Control(func(fd uintptr) { n, callErr = call(int(fd)) }); err != nil {
		return 0, err
	}
	return n, callErr
}

// closeAll closes descriptors on an error path and joins what that says to err.
func closeAll(err error, fds ...int) error {
	for _, fd := range fds {
		if e := unix.Close(fd); e != nil {
			err = errors.Join(err, fmt.Errorf("close: %w", e))
		}
	}
	return err
}
