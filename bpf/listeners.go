package bpf

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"

	"github.com/cilium/ebpf"
)

// lookupPin is the name of a link in a pod's pin directory.
const lookupPin = "lookup"

// Slot is the purpose and family of one of the proxy's listeners in a pod.
type Slot uint32

// The slots. A listener takes only connections of its slot's family; one for IPv4 must have IP_TRANSPARENT set.
const (
	OutboundIPv4 Slot = iota
	OutboundIPv6
	InboundPlaintextIPv4
	InboundPlaintextIPv6
	InboundHBONEIPv4
	InboundHBONEIPv6
	DNSIPv4
	DNSIPv6
	DNSOverTCPIPv4
	DNSOverTCPIPv6
)

// slots is how many there are.
const slots = DNSOverTCPIPv6 + 1

// Listeners is where the proxy puts its listening sockets in one pod. The listeners' addresses do not matter, and they
// must not be MPTCP sockets.
type Listeners struct {
	sockets *ebpf.Map
	netns   uint64
}

// OpenListeners opens the listeners of the pod whose network namespace has that cookie. The error is fs.ErrNotExist
// when the pod is not redirected by the programs of this package.
func OpenListeners(dir string, netnsCookie uint64) (*Listeners, error) {
	if _, err := os.Lstat(filepath.Join(dir, "pods", strconv.FormatUint(netnsCookie, 10))); err != nil {
		return nil, fmt.Errorf("open the pod's listeners: %w", err)
	}
	m, err := ebpf.LoadPinnedMap(filepath.Join(dir, "maps", connectMapListeners), nil)
	if err != nil {
		return nil, fmt.Errorf("open the pod's listeners: %w", err)
	}
	return &Listeners{m, netnsCookie}, nil
}

// Set makes the listening socket fd take the slot's connections from now on. A slot empties by itself when its socket
// is closed by all who hold it.
func (l *Listeners) Set(slot Slot, fd int) error {
	if err := l.sockets.Put(slot.key(l.netns), uint64(fd)); err != nil {
		return fmt.Errorf("set listener %d: %w", slot, err)
	}
	return nil
}

func (s Slot) key(netns uint64) connectListenerKey {
	return connectListenerKey{Netns: netns, Slot: connectSlot(s)}
}

// Close releases the handle; the listeners stay in force.
func (l *Listeners) Close() error { return l.sockets.Close() }

// toAddr gives an address the form that the programs compare: 16 bytes in network order, IPv4 as ::ffff:a.b.c.d.
func toAddr(ip netip.Addr) connectAddr {
	var a connectAddr
	if !ip.IsValid() {
		return a
	}
	b := ip.As16()
	for i := range a.Word {
		a.Word[i] = binary.NativeEndian.Uint32(b[4*i:])
	}
	return a
}

func fromAddr(a connectAddr) netip.Addr {
	var b [16]byte
	for i, w := range a.Word {
		binary.NativeEndian.PutUint32(b[4*i:], w)
	}
	return netip.AddrFrom16(b).Unmap()
}
