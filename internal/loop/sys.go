package loop

import (
	"net"
	"net/netip"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// System calls on non-blocking descriptors. They cannot sleep, so the Go scheduler is not told of them (RawSyscall); the
// errno comes back as it is, 0 for success, since an error value would be an allocation on the hot path.

// Read is read(2).
func Read(fd int, p []byte) (int, syscall.Errno) {
	return result(unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p))))
}

// Write is send(2) without SIGPIPE.
func Write(fd int, p []byte) (int, syscall.Errno) {
	return result(unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)),
		unix.MSG_NOSIGNAL, 0, 0))
}

// Readv is readv(2).
func Readv(fd int, v []unix.Iovec) (int, syscall.Errno) {
	return result(unix.RawSyscall(unix.SYS_READV, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(v))), uintptr(len(v))))
}

// Writev is writev(2), as sendmsg so that SIGPIPE stays off.
func Writev(fd int, v []unix.Iovec) (int, syscall.Errno) {
	var m unix.Msghdr
	m.Iov = unsafe.SliceData(v)
	m.SetIovlen(len(v))
	return result(unix.RawSyscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&m)), unix.MSG_NOSIGNAL))
}

func result(n, _ uintptr, e syscall.Errno) (int, syscall.Errno) {
	if e != 0 {
		return 0, e
	}
	return int(n), 0
}

// Peek is recv(2) that leaves what it reads in the socket.
func Peek(fd int, p []byte) (int, syscall.Errno) {
	return result(unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)),
		unix.MSG_PEEK, 0, 0))
}

// Over says that a TCP connection is over in the kernel: it was reset, or given up, and nothing more is sent on it.
func Over(fd int) bool {
	const closed = 7 // TCP_CLOSE of the kernel's tcp_states.h
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	return err == nil && info.State == closed
}

// ShutdownWrite is shutdown(2) of the writing half. An error means that the connection is gone, which its events tell.
func ShutdownWrite(fd int) { unix.RawSyscall(unix.SYS_SHUTDOWN, uintptr(fd), unix.SHUT_WR, 0) }

// Discard takes up to n bytes that fd has received without copying them (MSG_TRUNC of tcp(7)).
func Discard(fd, n int) (int, syscall.Errno) {
	return result(unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), 0, uintptr(n), unix.MSG_TRUNC, 0, 0))
}

// Unacknowledged is how many bytes sent on fd its peer has not acknowledged (SIOCOUTQ of tcp(7)), 0 for a connection that
// is gone.
func Unacknowledged(fd int) int {
	var n int32
	unix.RawSyscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCOUTQ, uintptr(unsafe.Pointer(&n)))
	return int(n)
}

// LingerZero makes the close of fd a TCP reset.
func LingerZero(fd int) {
	l := unix.Linger{Onoff: 1}
	unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_LINGER, uintptr(unsafe.Pointer(&l)), unsafe.Sizeof(l), 0)
}

// SocketError is the pending error of fd (SO_ERROR), 0 for none.
func SocketError(fd int) syscall.Errno {
	var v int32
	n := uint32(4)
	unix.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_ERROR, uintptr(unsafe.Pointer(&v)), uintptr(unsafe.Pointer(&n)), 0)
	return syscall.Errno(v)
}

// Accept is accept4(2): the new descriptor is non-blocking and close-on-exec, and from is the other end.
func Accept(fd int) (conn int, from netip.AddrPort, errno syscall.Errno) {
	var sa unix.RawSockaddrInet6
	size := uint32(unsafe.Sizeof(sa))
	n, _, errno := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(fd), uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&size)),
		unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	if errno != 0 {
		return -1, netip.AddrPort{}, errno
	}
	return int(n), addrPort(&sa), 0
}

// LocalAddr is getsockname(2); the zero value for a socket that is gone.
func LocalAddr(fd int) netip.AddrPort {
	var sa unix.RawSockaddrInet6
	size := uint32(unsafe.Sizeof(sa))
	unix.RawSyscall(unix.SYS_GETSOCKNAME, uintptr(fd), uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&size)))
	return addrPort(&sa)
}

// addrPort reads an address of either family, IPv4 in its own form.
func addrPort(sa *unix.RawSockaddrInet6) netip.AddrPort {
	port := (*[2]byte)(unsafe.Pointer(&sa.Port)) // network order
	at := uint16(port[0])<<8 | uint16(port[1])
	switch sa.Family {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(sa)).Addr), at)
	case unix.AF_INET6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), at)
	}
	return netip.AddrPort{}
}

// Reset closes fd, which no loop has, so that its other end sees a TCP reset.
func Reset(fd int) {
	LingerZero(fd)
	unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0)
}

// Attach is the opposite of Detach: it gives fd, which it owns, to the Go netpoller.
func Attach(fd int) (*net.TCPConn, error) {
	file := os.NewFile(uintptr(fd), "connection")
	defer file.Close()
	c, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// Detach takes c out of the Go netpoller: it returns a descriptor of the same socket, non-blocking and close-on-exec,
// and closes c. After an error c is still open.
func Detach(c *net.TCPConn) (int, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd, dupErr := -1, error(nil)
	err = raw.Control(func(f uintptr) { fd, dupErr = unix.FcntlInt(f, unix.F_DUPFD_CLOEXEC, 0) })
	if err == nil {
		err = dupErr
	}
	if err != nil {
		return -1, err
	}
	c.Close()
	return fd, nil
}
