package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
)

const (
	// guardPin and the interface index are the name of a link in a pod's pin directory.
	guardPin = "guard-"
	// eldersPin is a directory there, once the connections that are older than the pod's membership are exempt.
	eldersPin = "elders"
)

// Wire is the host's end of a pod's interface.
type Wire struct {
	// Ifindex is its index in the host's network namespace.
	Ifindex int
	// Nsid is the id by which the host's network namespace knows the pod's.
	Nsid int
}

// openGuard loads the guard's programs. Where the kernel cannot run them, pods are redirected without; Unguarded tells.
func (n *Node) openGuard() error {
	spec, err := loadGuard()
	if err != nil {
		return err
	}
	for name, value := range map[string]any{"probe4": toAddr(n.cfg.Probe4), "probe6": toAddr(n.cfg.Probe6)} {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("set %s of the guard: %w", name, err)
		}
	}
	for name, m := range spec.Maps {
		if !strings.HasPrefix(name, ".") {
			m.Pinning = ebpf.PinByName
		}
	}
	opts := &ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: n.path("maps")}}
	if err := spec.LoadAndAssign(&n.guard, opts); err != nil {
		n.unguarded = fmt.Errorf("load the guard (which needs Linux 6.6 or later with BTF): %w", err)
	}
	return nil
}

// Unguarded tells why packets that leave pods cannot be checked on this machine, or nil.
func (n *Node) Unguarded() error { return n.unguarded }

// EnsureElders lets the connections that exist in the pod's network namespace, which must be the calling thread's, go on
// past the guard. It is done once for a pod; with none set, there is nothing in the namespace yet. The result is how many
// connections are just being made, for which it must be called again; last says that it will not be.
func (n *Node) EnsureElders(cookie uint64, none, last bool) (pending int, err error) {
	done := n.podPath(cookie, eldersPin)
	if _, err := os.Lstat(done); err == nil || n.unguarded != nil {
		return 0, nil
	}
	if !none {
		if pending, err = n.runElders(); err != nil {
			return 0, fmt.Errorf("exempt open connections: %w", err)
		}
	}
	if pending > 0 && !last {
		return pending, nil
	}
	if err := os.Mkdir(done, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return 0, fmt.Errorf("note that open connections are exempt: %w", err)
	}
	return 0, nil
}

func (n *Node) runElders() (pending int, err error) {
	it, err := link.AttachIter(link.IterOptions{Program: n.guard.Elders})
	if err != nil {
		return 0, err
	}
	defer it.Close()
	reader, err := it.Open()
	if err != nil {
		return 0, err
	}
	defer reader.Close()
	written, err := io.ReadAll(reader)
	return len(written), err
}

// EnsureGuard checks what arrives from a pod over wires, and over no others. It must be called in the host's network
// namespace.
func (n *Node) EnsureGuard(pod Pod, wires []Wire) error {
	if n.unguarded != nil {
		return nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, w := range wires {
		if err := n.ensureWire(pod, w); err != nil {
			return fmt.Errorf("guard the pod's interface %d: %w", w.Ifindex, err)
		}
	}
	return n.removeGuard(pod.Cookie, wires)
}

func (n *Node) ensureWire(pod Pod, w Wire) error {
	if !n.knows(pod, w) {
		wire := guardWire{Netns: pod.Cookie, Nsid: int32(w.Nsid), Flags: uint32(pod.flags())}
		if err := n.guard.Wires.Put(uint32(w.Ifindex), wire); err != nil {
			return err
		}
	}
	pin := n.podPath(pod.Cookie, guardPin+strconv.Itoa(w.Ifindex))
	old, err := link.LoadPinnedLink(pin, nil)
	if err == nil {
		defer old.Close()
		if guards(old, w) {
			return old.Update(n.guard.Guard)
		}
		if err := old.Unpin(); err != nil {
			return fmt.Errorf("unpin a link to an interface that is gone: %w", err)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("open pinned link: %w", err)
	}
	made, err := link.AttachTCX(link.TCXOptions{
		Interface: w.Ifindex, Program: n.guard.Guard, Attach: ebpf.AttachTCXIngress, Anchor: link.Head(),
	})
	if err != nil {
		return err
	}
	defer made.Close()
	return made.Pin(pin)
}

// knows tells whether the guard has the wire as the pod's.
func (n *Node) knows(pod Pod, w Wire) bool {
	var have guardWire
	err := n.guard.Wires.Lookup(uint32(w.Ifindex), &have)
	return err == nil && have.Netns == pod.Cookie && have.Nsid == int32(w.Nsid) && have.Flags == uint32(pod.flags())
}

// guards tells whether a link is attached to the wire's interface.
func guards(l link.Link, w Wire) bool {
	info, err := l.Info()
	if err != nil {
		return false
	}
	tcx := info.TCX()
	return tcx != nil && tcx.Ifindex == uint32(w.Ifindex)
}

// Guarded tells whether the pod's wires are guarded as EnsureGuard would, where that can be.
func (n *Node) Guarded(pod Pod, wires []Wire) (bool, error) {
	if n.unguarded != nil {
		return true, nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if pins, err := filepath.Glob(n.podPath(pod.Cookie, guardPin+"*")); err != nil || len(pins) != len(wires) {
		return false, err
	}
	for _, w := range wires {
		if !n.knows(pod, w) {
			return false, nil
		}
		l, err := link.LoadPinnedLink(n.podPath(pod.Cookie, guardPin+strconv.Itoa(w.Ifindex)), nil)
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("open pinned link: %w", err)
		}
		attached := guards(l, w)
		l.Close()
		if !attached {
			return false, nil
		}
	}
	return true, nil
}

// removeGuard ends the guard of a pod, but for the wires given.
func (n *Node) removeGuard(cookie uint64, but []Wire) error {
	pins, err := filepath.Glob(n.podPath(cookie, guardPin+"*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, pin := range pins {
		index, err := strconv.ParseUint(strings.TrimPrefix(filepath.Base(pin), guardPin), 10, 32)
		if err == nil && slices.ContainsFunc(but, func(w Wire) bool { return w.Ifindex == int(index) }) {
			continue
		}
		if err := detach(pin); err != nil {
			errs = append(errs, fmt.Errorf("detach the pod's guard: %w", err))
		}
		if err != nil || n.guard.Wires == nil {
			continue
		}
		var have guardWire
		if n.guard.Wires.Lookup(uint32(index), &have) == nil && have.Netns == cookie {
			errs = append(errs, n.guard.Wires.Delete(uint32(index)))
		}
	}
	return errors.Join(errs...)
}

// Attempt is TCP that went round the proxy and was dropped.
type Attempt struct {
	// Cookie is that of the pod's network namespace.
	Cookie uint64
	// To is where the packet went. The port is 0 when it could not be read.
	To netip.AddrPort
}

// Attempts tells of attempts to avoid the proxy, at most one a second for each pod, until stop is called.
func (n *Node) Attempts() (next func() (Attempt, error), stop func() error, err error) {
	if n.unguarded != nil {
		return nil, nil, n.unguarded
	}
	reader, err := ringbuf.NewReader(n.guard.Attempts)
	if err != nil {
		return nil, nil, fmt.Errorf("read attempts to avoid the proxy: %w", err)
	}
	return func() (Attempt, error) {
		record, err := reader.Read()
		if err != nil {
			return Attempt{}, err
		}
		return decodeAttempt(record.RawSample)
	}, reader.Close, nil
}

func decodeAttempt(raw []byte) (Attempt, error) {
	var a guardAttempt
	if _, err := binary.Decode(raw, binary.NativeEndian, &a); err != nil {
		return Attempt{}, fmt.Errorf("decode an attempt: %w", err)
	}
	return Attempt{a.Netns, netip.AddrPortFrom(fromAddr(connectAddr{Word: a.Dst.Word}), uint16(a.Port))}, nil
}
