package netns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// PacketListener receives UDP inside a network namespace, whatever address it was sent to, and answers from that very
// address. Its methods are safe for concurrent use, but only one goroutine may call Read.
type PacketListener struct {
	*net.UDPConn
	addr netip.AddrPort
	raw  *os.File
	oob  []byte
}

// ListenPacket listens on addr inside ns (nil: the process's own namespace). The socket carries ProxyMark. It needs
// CAP_NET_RAW besides what Listen needs.
//
// Answers come from addresses that are not the namespace's own, and from ports that belong to the application's own
// sockets: no UDP socket may be bound there. They are sent by a raw socket.
func ListenPacket(ns *os.File, addr netip.AddrPort) (*PacketListener, error) {
	fail := func(err error) (*PacketListener, error) {
		return nil, &net.OpError{Op: "listen", Net: "udp", Addr: net.UDPAddrFromAddrPort(addr), Err: err}
	}
	fd, err := socket(ns, addr.Addr(), unix.SOCK_DGRAM, 0)
	if err != nil {
		return fail(err)
	}
	six := addr.Addr().Is6()
	err = setAll(fd, []option{
		// As in Listen: the successor listens on the same port before this process has ended.
		{unix.SOL_SOCKET, unix.SO_REUSEPORT, 1, addr.Port() != 0},
		{unix.SOL_SOCKET, unix.SO_MARK, int(ProxyMark), true},
		{unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1, six},
		{unix.SOL_IP, unix.IP_TRANSPARENT, 1, !six},
		{unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1, six},
		{unix.SOL_IP, unix.IP_PKTINFO, 1, !six},
		{unix.SOL_IPV6, unix.IPV6_RECVPKTINFO, 1, six},
	})
	if err == nil {
		err = os.NewSyscallError("bind", unix.Bind(fd, sockaddr(addr)))
	}
	if err != nil {
		return fail(closeAll(err, fd))
	}
	raw, err := socket(ns, addr.Addr(), unix.SOCK_RAW, unix.IPPROTO_RAW)
	if err != nil {
		return fail(closeAll(err, fd))
	}
	if err := setAll(raw, []option{{unix.SOL_SOCKET, unix.SO_MARK, int(ProxyMark), true}}); err != nil {
		return fail(closeAll(err, fd, raw))
	}
	conn, err := packetConn(fd)
	if err != nil {
		return fail(closeAll(err, raw))
	}
	local := conn.LocalAddr().(*net.UDPAddr).AddrPort()
	return &PacketListener{
		UDPConn: conn, addr: netip.AddrPortFrom(local.Addr().Unmap(), local.Port()),
		raw: os.NewFile(uintptr(raw), "answers"), oob: make([]byte, 128),
	}, nil
}

// Addr is what the listener is bound to.
func (l *PacketListener) Addr() netip.AddrPort { return l.addr }

// Close ends the listener.
func (l *PacketListener) Close() error { return errors.Join(l.UDPConn.Close(), l.raw.Close()) }

// Read receives one packet into b. to is the address it was sent to; the port it was sent to is not known. truncated
// tells that it did not fit.
func (l *PacketListener) Read(b []byte) (n int, from netip.AddrPort, to netip.Addr, truncated bool, err error) {
	n, oobn, flags, from, err := l.ReadMsgUDPAddrPort(b, l.oob)
	if err != nil {
		return 0, netip.AddrPort{}, netip.Addr{}, false, err
	}
	to, err = packetDestination(l.oob[:oobn])
	return n, netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), to, flags&unix.MSG_TRUNC != 0, err
}

// packetDestination reads the address that a packet was sent to from its control messages.
func packetDestination(oob []byte) (netip.Addr, error) {
	for len(oob) > 0 {
		header, body, rest, err := unix.ParseOneSocketControlMessage(oob)
		if err != nil {
			return netip.Addr{}, fmt.Errorf("read a packet's destination: %w", err)
		}
		switch {
		case header.Level == unix.SOL_IP && header.Type == unix.IP_PKTINFO && len(body) >= unix.SizeofInet4Pktinfo:
			return netip.AddrFrom4([4]byte(body[8:12])), nil
		case header.Level == unix.SOL_IPV6 && header.Type == unix.IPV6_PKTINFO && len(body) >= unix.SizeofInet6Pktinfo:
			return netip.AddrFrom16([16]byte(body[:16])).Unmap(), nil
		}
		oob = rest
	}
	return netip.Addr{}, errors.New("read a packet's destination: the kernel does not tell")
}

// Write sends a packet to an address of this namespace, from any address, also one that is not the namespace's own.
func (l *PacketListener) Write(b []byte, from, to netip.AddrPort) error {
	packet, err := datagram(b, from, to)
	if err != nil {
		return err
	}
	raw, err := l.raw.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	err = raw.Control(func(fd uintptr) {
		sent = unix.Sendto(int(fd), packet, unix.MSG_DONTWAIT, sockaddr(netip.AddrPortFrom(to.Addr(), 0)))
	})
	return errors.Join(err, os.NewSyscallError("sendto", sent))
}

// WriteOwn sends a packet from the listener's own address.
func (l *PacketListener) WriteOwn(b []byte, to netip.AddrPort) error {
	_, err := l.WriteToUDPAddrPort(b, to)
	return err
}

const (
	ipv4Header = 20
	ipv6Header = 40
	udpHeader  = 8
	// hops is how far a packet may go; those of this file stay in their namespace.
	hops = 64
)

// datagram is a UDP packet with its IP header (RFC 768, 791, 8200). The kernel fills in IPv4's checksum.
func datagram(b []byte, from, to netip.AddrPort) ([]byte, error) {
	size := udpHeader + len(b)
	if from.Addr().Is4() != to.Addr().Is4() || ipv4Header+size > 0xffff {
		return nil, fmt.Errorf("make a packet of %d bytes from %s to %s: %w", len(b), from, to, unix.EINVAL)
	}
	var packet []byte
	source, destination := from.Addr().AsSlice(), to.Addr().AsSlice()
	if from.Addr().Is4() {
		packet = append(make([]byte, 0, ipv4Header+size), 0x45, 0)
		packet = binary.BigEndian.AppendUint16(packet, uint16(ipv4Header+size))
		packet = append(packet, 0, 0, 0, 0, hops, unix.IPPROTO_UDP, 0, 0)
	} else {
		packet = append(make([]byte, 0, ipv6Header+size), 0x60, 0, 0, 0)
		packet = binary.BigEndian.AppendUint16(packet, uint16(size))
		packet = append(packet, unix.IPPROTO_UDP, hops)
	}
	packet = append(append(packet, source...), destination...)
	start := len(packet)
	packet = binary.BigEndian.AppendUint16(packet, from.Port())
	packet = binary.BigEndian.AppendUint16(packet, to.Port())
	packet = binary.BigEndian.AppendUint16(packet, uint16(size))
	packet = append(append(packet, 0, 0), b...)
	sum := uint32(unix.IPPROTO_UDP) + uint32(size)
	for _, part := range [][]byte{source, destination, packet[start:]} {
		sum += onesSum(part)
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	checksum := ^uint16(sum)
	if checksum == 0 {
		checksum = 0xffff // 0 would say that there is none
	}
	binary.BigEndian.PutUint16(packet[start+6:], checksum)
	return packet, nil
}

// onesSum adds up 16-bit words; 64 KiB of them do not overflow.
func onesSum(b []byte) (sum uint32) {
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(b[0])<<8 | uint32(b[1])
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	return sum
}

// DialPacket makes a UDP socket inside ns that speaks to dst only, from a port of the kernel's choice. It carries mark
// (0: none). Packets from elsewhere do not reach it.
func DialPacket(ctx context.Context, ns *os.File, mark uint32, dst netip.AddrPort) (*net.UDPConn, error) {
	dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	fail := func(err error) (*net.UDPConn, error) {
		return nil, &net.OpError{Op: "dial", Net: "udp", Addr: net.UDPAddrFromAddrPort(dst), Err: err}
	}
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	fd, err := socket(ns, dst.Addr(), unix.SOCK_DGRAM, 0)
	if err != nil {
		return fail(err)
	}
	if err := setAll(fd, []option{{unix.SOL_SOCKET, unix.SO_MARK, int(mark), mark != 0}}); err != nil {
		return fail(closeAll(err, fd))
	}
	if err := unix.Connect(fd, sockaddr(dst)); err != nil {
		return fail(closeAll(os.NewSyscallError("connect", err), fd))
	}
	conn, err := packetConn(fd)
	if err != nil {
		return fail(err)
	}
	return conn, nil
}

// packetConn takes fd over.
func packetConn(fd int) (*net.UDPConn, error) {
	file := os.NewFile(uintptr(fd), "packets")
	defer file.Close()
	conn, err := net.FilePacketConn(file)
	if err != nil {
		return nil, err
	}
	return conn.(*net.UDPConn), nil
}
