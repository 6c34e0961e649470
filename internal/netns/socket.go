package netns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// backlog is how many finished handshakes may wait for Accept; the kernel lowers it to net.core.somaxconn.
const backlog = 4096

// DialOptions say how Dial makes its socket.
type DialOptions struct {
	// Source is the address the connection comes from. The zero value leaves it to the kernel; a zero port leaves the
	// port to the kernel.
	Source netip.AddrPort
	// Mark is the socket's SO_MARK; 0 sets none.
	Mark uint32
	// Device binds the socket to an interface by name (SO_BINDTODEVICE); empty means any.
	Device string
	// Transparent allows a Source that is no address of the namespace (IP_TRANSPARENT).
	Transparent bool
}

// Listen listens for TCP inside ns (nil: the process's own namespace). network is "tcp4" or "tcp6", or "tcp" for the
// family of addr, where an unspecified IPv6 address takes IPv4 too. The listener, and so each accepted connection,
// carries mark; transparent lets it accept connections to addresses that are not the namespace's own. It never
// speaks MPTCP, because such sockets cannot be handed connections by BPF.
func Listen(ns *os.File, network string, addr netip.AddrPort, mark uint32, transparent bool) (*net.TCPListener, error) {
	fail := func(err error) (*net.TCPListener, error) {
		return nil, &net.OpError{Op: "listen", Net: network, Addr: net.TCPAddrFromAddrPort(addr), Err: err}
	}
	addr = netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
	v6only := 1
	if network == "tcp" && addr.Addr().Is6() && addr.Addr().IsUnspecified() {
		v6only = 0
	}
	fd, err := socket(ns, addr.Addr(), unix.SOCK_STREAM, unix.IPPROTO_TCP)
	if err != nil {
		return fail(err)
	}
	set := []option{
		{unix.SOL_SOCKET, unix.SO_REUSEADDR, 1, true},
		// The successor of this process listens on the same port before this one has ended.
		{unix.SOL_SOCKET, unix.SO_REUSEPORT, 1, addr.Port() != 0},
		{unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, v6only, addr.Addr().Is6()},
		{unix.SOL_SOCKET, unix.SO_MARK, int(mark), true},
		{unix.SOL_IP, unix.IP_TRANSPARENT, 1, transparent},
		// An urgent byte stays where it is in the stream (RFC 6093); else it would be lost. Accepted sockets inherit it.
		{unix.SOL_SOCKET, unix.SO_OOBINLINE, 1, true},
	}
	if err := setAll(fd, set); err != nil {
		return fail(closeAll(err, fd))
	}
	if err := unix.Bind(fd, sockaddr(addr)); err != nil {
		return fail(closeAll(os.NewSyscallError("bind", err), fd))
	}
	if err := unix.Listen(fd, backlog); err != nil {
		return fail(closeAll(os.NewSyscallError("listen", err), fd))
	}
	if addr.Port() != 0 {
		if err := preferSecond(fd); err != nil {
			return fail(closeAll(err, fd))
		}
	}
	file := os.NewFile(uintptr(fd), "listener")
	defer file.Close()
	l, err := net.FileListener(file)
	if err != nil {
		return fail(err)
	}
	return l.(*net.TCPListener), nil
}

// preferSecond gives new connections to the second of the listeners on a port, which is the successor's: the first gets no more
// that its end could cut. The kernel chooses by the program's number, or as it pleases where there is no such listener.
func preferSecond(fd int) error {
	program := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 1}
	err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF, &unix.SockFprog{Len: 1, Filter: &program})
	return os.NewSyscallError("setsockopt SO_ATTACH_REUSEPORT_CBPF", err)
}

// Dial connects to dst from inside ns (nil: the process's own namespace). The errno of a failed connect(2) can be
// found in the error with errors.Is (ECONNREFUSED and so on); when ctx ends first, the error is ctx's.
func Dial(ctx context.Context, ns *os.File, opts DialOptions, dst netip.AddrPort) (*net.TCPConn, error) {
	dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	fail := func(err error) (*net.TCPConn, error) {
		op := &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(dst), Err: err}
		if opts.Source.IsValid() {
			op.Source = net.TCPAddrFromAddrPort(opts.Source)
		}
		return nil, op
	}
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	fd, err := socket(ns, dst.Addr(), unix.SOCK_STREAM, unix.IPPROTO_TCP)
	if err != nil {
		return fail(err)
	}
	if err := prepare(fd, opts); err != nil {
		return fail(closeAll(err, fd))
	}
	connectErr := unix.Connect(fd, sockaddr(dst))
	// From here on the descriptor belongs to file; as it is non-blocking, it waits in Go's poller.
	file := os.NewFile(uintptr(fd), "connection")
	defer file.Close()
	if errors.Is(connectErr, unix.EINPROGRESS) {
		connectErr = wait(ctx, file)
	}
	if connectErr != nil {
		var errno unix.Errno
		if errors.As(connectErr, &errno) {
			connectErr = os.NewSyscallError("connect", errno)
		}
		return fail(connectErr)
	}
	conn, err := net.FileConn(file)
	if err != nil {
		return fail(err)
	}
	return conn.(*net.TCPConn), nil
}

// socket makes a non-blocking socket of the address's family inside ns.
func socket(ns *os.File, addr netip.Addr, kind, protocol int) (fd int, err error) {
	family := unix.AF_INET
	if addr.Is6() {
		family = unix.AF_INET6
	}
	err = Do(ns, func() error {
		fd, err = unix.Socket(family, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, protocol)
		return os.NewSyscallError("socket", err)
	})
	if err != nil {
		return -1, err
	}
	return fd, nil
}

// prepare sets what must be set before connect(2).
func prepare(fd int, opts DialOptions) error {
	set := []option{
		{unix.SOL_SOCKET, unix.SO_MARK, int(opts.Mark), opts.Mark != 0},
		{unix.SOL_IP, unix.IP_TRANSPARENT, 1, opts.Transparent},
		// With a port of 0 the kernel may wait until connect to choose it, and then only the four-tuple must be free.
		{unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1, opts.Source.IsValid() && opts.Source.Port() == 0},
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1, true},
		{unix.SOL_SOCKET, unix.SO_OOBINLINE, 1, true}, // as in Listen
		// The application's own probes end at the proxy beside it, so the proxy must notice an end that is gone: as Go's own
		// sockets do.
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1, true},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 15, true},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 15, true},
	}
	if err := setAll(fd, set); err != nil {
		return err
	}
	if opts.Device != "" {
		if err := unix.SetsockoptString(fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE, opts.Device); err != nil {
			return os.NewSyscallError("setsockopt SO_BINDTODEVICE "+opts.Device, err)
		}
	}
	if opts.Source.IsValid() {
		source := netip.AddrPortFrom(opts.Source.Addr().Unmap(), opts.Source.Port())
		if err := unix.Bind(fd, sockaddr(source)); err != nil {
			return os.NewSyscallError("bind", err)
		}
	}
	return nil
}

// wait returns when the connection is made, has failed, or ctx has ended.
func wait(ctx context.Context, file *os.File) error {
	stop := context.AfterFunc(ctx, func() { file.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	err = raw.Write(func(fd uintptr) bool {
		result = connected(int(fd))
		return !errors.Is(result, unix.EINPROGRESS)
	})
	if err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	return errors.Join(err, result)
}

// connected tells what became of a connect(2) in progress: nil, EINPROGRESS or why it failed.
func connected(fd int) error {
	errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		return err
	}
	if errno != 0 {
		return unix.Errno(errno)
	}
	if _, err := unix.Getpeername(fd); err != nil {
		if errors.Is(err, unix.ENOTCONN) {
			return unix.EINPROGRESS
		}
		return err
	}
	return nil
}

// option is one integer socket option, set only when wanted.
type option struct {
	level, name, value int
	wanted             bool
}

func setAll(fd int, options []option) error {
	for _, o := range options {
		if !o.wanted {
			continue
		}
		if err := unix.SetsockoptInt(fd, o.level, o.name, o.value); err != nil {
			return fmt.Errorf("setsockopt level %d option %d: %w", o.level, o.name, err)
		}
	}
	return nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}
