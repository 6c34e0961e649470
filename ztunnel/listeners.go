package ztunnel

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/bpf"
	"github.com/fairlead-mesh/fairlead/internal/loop"
	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/internal/zds"
)

// purpose is what a listener takes.
type purpose int

const (
	purposeOutbound purpose = iota
	purposePlaintext
	purposeHBONE
	purposeDNS
)

// purposes gives each purpose the port that redirection rules lead to, and its eBPF slots.
var purposes = [...]struct {
	port       uint16
	ipv4, ipv6 bpf.Slot
}{
	purposeOutbound:  {15001, bpf.OutboundIPv4, bpf.OutboundIPv6},
	purposePlaintext: {15006, bpf.InboundPlaintextIPv4, bpf.InboundPlaintextIPv6},
	purposeHBONE:     {15008, bpf.InboundHBONEIPv4, bpf.InboundHBONEIPv6},
	purposeDNS:       {15053, bpf.DNSOverTCPIPv4, bpf.DNSOverTCPIPv6},
}

// listener is one of a pod's listeners.
type listener struct {
	*net.TCPListener
	purpose purpose
	slots   bool
	addr    netip.AddrPort
}

// listen makes a pod's listeners. With slots they take any free port of loopback, so that all ports stay the
// application's; else those that the redirection rules lead to.
func listen(ns *os.File, slots bool) ([]*listener, error) {
	var made []*listener
	for p := purposeOutbound; p <= purposeDNS; p++ {
		var some []*listener
		var err error
		switch own := loopback(purposes[p].port, slots); {
		case slots, p == purposeDNS: // nobody but the pod is to reach its DNS
			some, err = listenPair(ns, p, slots, own[0], own[1])
		default:
			some, err = listenAny(ns, p)
		}
		if err != nil {
			for _, l := range made {
				l.Close()
			}
			return nil, fmt.Errorf("listen in the pod's network namespace: %w", err)
		}
		made = append(made, some...)
	}
	return made, nil
}

// loopback is where listeners are that only redirection leads to: on any free port with slots.
func loopback(port uint16, slots bool) [2]netip.AddrPort {
	if slots {
		port = 0
	}
	return [2]netip.AddrPort{
		netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port), netip.AddrPortFrom(netip.IPv6Loopback(), port),
	}
}

// noFamily tells whether an error says that the namespace has no addresses of a family.
func noFamily(err error) bool {
	return errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EAFNOSUPPORT)
}

// listenPair listens on an IPv4 and an IPv6 address. A namespace without IPv6 gets no listener for it: its slot stays
// empty, which refuses what cannot come.
func listenPair(ns *os.File, p purpose, slots bool, ipv4, ipv6 netip.AddrPort) ([]*listener, error) {
	mark := netns.ProxyMark
	if slots && (p == purposeOutbound || p == purposeDNS) {
		mark = netns.RedirectMark // the other end is the application's, in the same namespace
	}
	four, err := netns.Listen(ns, "tcp4", ipv4, mark, true)
	if err != nil {
		return nil, err
	}
	made := []*listener{newListener(four, p, slots)}
	six, err := netns.Listen(ns, "tcp6", ipv6, mark, true)
	switch {
	case err == nil:
		return append(made, newListener(six, p, slots)), nil
	case noFamily(err):
		return made, nil
	}
	four.Close()
	return nil, err
}

// listenAny listens on a purpose's own port, of both families where there are two.
func listenAny(ns *os.File, p purpose) ([]*listener, error) {
	port := purposes[p].port
	return listenPair(ns, p, false, netip.AddrPortFrom(netip.IPv4Unspecified(), port), netip.AddrPortFrom(netip.IPv6Unspecified(), port))
}

func newListener(l *net.TCPListener, p purpose, slots bool) *listener {
	return &listener{TCPListener: l, purpose: p, slots: slots, addr: addrPort(l.Addr())}
}

// slot is where the listener belongs.
func (l *listener) slot() bpf.Slot {
	if l.addr.Addr().Is6() {
		return purposes[l.purpose].ipv6
	}
	return purposes[l.purpose].ipv4
}

// openSlots opens the slots of the pod with that network namespace; nil when it is not redirected by eBPF.
func openSlots(bpffs string, cookie uint64) (*bpf.Listeners, error) {
	slots, err := bpf.OpenListeners(bpffs, cookie)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return slots, err
}

// slotted is a socket that belongs into a slot.
type slotted interface {
	SyscallConn() (syscall.RawConn, error)
	slot() bpf.Slot
}

// fillSlots puts the pod's listeners where the programs find them.
func (p *pod) fillSlots(slots *bpf.Listeners) error {
	var all []slotted
	for _, l := range p.listeners {
		all = append(all, l)
	}
	for _, l := range p.packets {
		all = append(all, l)
	}
	for _, l := range all {
		raw, err := l.SyscallConn()
		if err != nil {
			return err
		}
		var set error
		err = raw.Control(func(fd uintptr) { set = slots.Set(l.slot(), int(fd)) })
		if err := errors.Join(err, set); err != nil {
			return err
		}
	}
	return nil
}

// asked is the address that a connection was opened to. Redirection leaves it as the accepted socket's own address,
// except for rules that rewrite it to the listener's: those keep it beside (SO_ORIGINAL_DST). A connection that was
// really opened to the listener has none, and would lead back to it for ever.
func (l *listener) asked(conn int) (netip.AddrPort, *failure) {
	local := loop.LocalAddr(conn)
	if l.slots && local != l.addr || !l.slots && local.Port() != l.addr.Port() {
		return local, nil
	}
	if !l.slots {
		if original, err := originalDestination(conn, local.Addr().Is4()); err == nil && original != local {
			return original, nil
		}
	}
	return local, fail(reasonSelfCall, "the connection was opened to the proxy's own listener")
}

// soOriginalDst is SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST of the kernel's netfilter headers.
const soOriginalDst = 80

// originalDestination asks netfilter for the address that a redirected connection was opened to.
func originalDestination(conn int, ipv4 bool) (netip.AddrPort, error) {
	if ipv4 {
		var sa unix.RawSockaddrInet4
		err := getsockopt(uintptr(conn), unix.SOL_IP, soOriginalDst, unsafe.Pointer(&sa), unix.SizeofSockaddrInet4)
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), networkOrder(sa.Port)), err
	}
	var sa unix.RawSockaddrInet6
	err := getsockopt(uintptr(conn), unix.SOL_IPV6, soOriginalDst, unsafe.Pointer(&sa), unix.SizeofSockaddrInet6)
	return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), networkOrder(sa.Port)), err
}

func getsockopt(fd uintptr, level, name int, value unsafe.Pointer, size uint32) error {
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, uintptr(level), uintptr(name), uintptr(value), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// networkOrder reads a port as it lies in memory.
func networkOrder(port uint16) uint16 {
	b := (*[2]byte)(unsafe.Pointer(&port))
	return uint16(b[0])<<8 | uint16(b[1])
}

// addrPort is a TCP address as a value, IPv4 in its own form.
func addrPort(a net.Addr) netip.AddrPort {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := tcp.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}

// reset closes a connection so that its other end sees a RST.
func reset(conn *net.TCPConn) {
	_ = conn.SetLinger(0) // fails only on a socket that is closed already
	conn.Close()
}

func compareNames(a, b zds.Workload) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.UID, b.UID))
}
