package lab

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// hbonePort is the port of the mesh's tunnels.
const hbonePort = 15008

// Traffic is what a capture has seen of TCP, in bytes of payload.
type Traffic struct {
	// Clear is the payload outside the tunnels, and every segment with a Marker, wherever it was.
	Clear int64
	// Tunnel is the payload of connections to port 15008.
	Tunnel int64
	// Markers is how many times the Marker could be read.
	Markers int64
	// Lost is how many packets the capture missed; a capture with losses proves nothing.
	Lost int64
}

// Capture reads every packet of a link.
type Capture struct {
	fd     int
	ignore []netip.Addr
	stop   chan struct{}
	done   chan struct{}

	mu    sync.Mutex
	buf   []byte
	total Traffic
}

// capture starts reading an interface of the thread's namespace. Packets from or to the ignored addresses do not count.
func (t *thread) capture(device string, ignore []netip.Addr) (*Capture, error) {
	c := &Capture{ignore: ignore, buf: make([]byte, 1<<18), stop: make(chan struct{}), done: make(chan struct{})}
	err := t.do(func() error {
		link, err := netlink.LinkByName(device)
		if err != nil {
			return err
		}
		all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
		c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		if err := unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 128<<20); err != nil {
			return errors.Join(os.NewSyscallError("setsockopt", err), unix.Close(c.fd))
		}
		if err := unix.Bind(c.fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Attrs().Index}); err != nil {
			return errors.Join(os.NewSyscallError("bind", err), unix.Close(c.fd))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	go c.run()
	return c, nil
}

// run keeps the socket's buffer from filling up.
func (c *Capture) run() {
	defer close(c.done)
	for tick := time.NewTicker(5 * time.Millisecond); ; {
		select {
		case <-c.stop:
			tick.Stop()
			return
		case <-tick.C:
			c.mu.Lock()
			c.drain()
			c.mu.Unlock()
		}
	}
}

// Total is the traffic since the capture began, including every packet that was on the link before the call.
func (c *Capture) Total() (Traffic, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.drain(); err != nil {
		return Traffic{}, err
	}
	stats, err := unix.GetsockoptTpacketStats(c.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil {
		return Traffic{}, os.NewSyscallError("getsockopt", err)
	}
	c.total.Lost += int64(stats.Drops)
	return c.total, nil
}

// Since is the traffic after an earlier total, or an error when packets were missed meanwhile.
func (c *Capture) Since(before Traffic) (Traffic, error) {
	now, err := c.Total()
	if err != nil {
		return Traffic{}, err
	}
	if now.Lost != before.Lost {
		return Traffic{}, fmt.Errorf("the capture missed %d packets", now.Lost-before.Lost)
	}
	return Traffic{Clear: now.Clear - before.Clear, Tunnel: now.Tunnel - before.Tunnel, Markers: now.Markers - before.Markers}, nil
}

// drain counts all packets that wait in the socket.
func (c *Capture) drain() error {
	for {
		n, _, err := unix.Recvfrom(c.fd, c.buf, 0)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("read packets: %w", err)
		default:
			c.count(c.buf[:n])
		}
	}
}

func (c *Capture) count(frame []byte) {
	s, ok := parseSegment(frame)
	if !ok || len(s.payload) == 0 || slices.Contains(c.ignore, s.source.Addr()) || slices.Contains(c.ignore, s.destination.Addr()) {
		return
	}
	size, markers := int64(len(s.payload)), int64(bytes.Count(s.payload, []byte(Marker)))
	tunnel := s.source.Port() == hbonePort || s.destination.Port() == hbonePort
	if tunnel {
		c.total.Tunnel += size
	}
	if !tunnel || markers > 0 {
		c.total.Clear += size
	}
	c.total.Markers += markers
}

// close ends the capture.
func (c *Capture) close() {
	close(c.stop)
	<-c.done
	unix.Close(c.fd)
}

// segment is a TCP segment with its addresses.
type segment struct {
	source, destination netip.AddrPort
	payload             []byte
}

const (
	ethernetHeader = 14
	ipv4Header     = 20
	ipv6Header     = 40
	tcpHeader      = 20
)

// parseSegment reads an Ethernet frame; it is false for what is not TCP over IPv4 or IPv6. IPv6 extension headers and
// fragments do not occur on a lab's links.
func parseSegment(frame []byte) (segment, bool) {
	if len(frame) < ethernetHeader+ipv4Header {
		return segment{}, false
	}
	packet := frame[ethernetHeader:]
	var source, destination netip.Addr
	switch binary.BigEndian.Uint16(frame[12:]) {
	case unix.ETH_P_IP:
		header := int(packet[0]&0xf) * 4
		total := int(binary.BigEndian.Uint16(packet[2:]))
		if packet[9] != unix.IPPROTO_TCP || header < ipv4Header || len(packet) < header {
			return segment{}, false
		}
		source, _ = netip.AddrFromSlice(packet[12:16])
		destination, _ = netip.AddrFromSlice(packet[16:20])
		// A length of 0 marks a packet that is larger than the field can tell; it fills the frame.
		if total >= header && total <= len(packet) {
			packet = packet[:total]
		}
		packet = packet[header:]
	case unix.ETH_P_IPV6:
		if len(packet) < ipv6Header || packet[6] != unix.IPPROTO_TCP {
			return segment{}, false
		}
		source, _ = netip.AddrFromSlice(packet[8:24])
		destination, _ = netip.AddrFromSlice(packet[24:40])
		if size := int(binary.BigEndian.Uint16(packet[4:])); size > 0 && ipv6Header+size <= len(packet) {
			packet = packet[:ipv6Header+size]
		}
		packet = packet[ipv6Header:]
	default:
		return segment{}, false
	}
	if len(packet) < tcpHeader {
		return segment{}, false
	}
	header := int(packet[12]>>4) * 4
	if header < tcpHeader || len(packet) < header {
		return segment{}, false
	}
	return segment{
		source:      netip.AddrPortFrom(source, binary.BigEndian.Uint16(packet)),
		destination: netip.AddrPortFrom(destination, binary.BigEndian.Uint16(packet[2:])),
		payload:     packet[header:],
	}, true
}
