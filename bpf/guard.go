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
	// guardPin and the interface index are the name of a link in a pod's pin directory; filterPin and the index that of an
	// empty directory there: the guard is on that interface as a filter, to which there is no link.
	guardPin  = "guard-"
	filterPin = "filter-"
	// eldersPin is a directory there, once the connections that are older than the pod's membership are exempt.
	eldersPin = "elders"
	// changedPin is a directory there, while those that are older than a change of its exclusions are not.
	changedPin = "changed"
)

// Wire is the host's end of a pod's interface.
type Wire struct {
	// Ifindex is its index in the host's network namespace.
	Ifindex int
	// Nsid is the id by which the host's network namespace knows the pod's.
	Nsid int
}

// Filters puts the guard on interfaces of the calling thread's network namespace as filters of traffic control: that takes
// microseconds, where a tcx link waits for all CPUs of the kernel while it holds up all other changes of the network. (It is
// not of this package because the node proxy has no use for it.)
type Filters interface {
	// Ensure makes the program decide what arrives over an interface, in place of an older one of ours. taken says that it
	// did not, because the interface has filters of somebody else.
	Ensure(ifindex int, program *ebpf.Program) (taken bool, err error)
	// Has tells whether the program decides.
	Has(ifindex int, program *ebpf.Program) (bool, error)
	// Remove takes ours away. It is no error when there is none, or no such interface.
	Remove(ifindex int) error
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
		n.unguarded = fmt.Errorf("load the guard (which needs a kernel with BTF): %w", err)
	}
	return nil
}

// Unguarded tells why packets that leave pods, or some of them, cannot be checked on this machine, or nil.
func (n *Node) Unguarded() error {
	why := n.unguarded
	n.bare.Range(func(_, reason any) bool {
		why = reason.(error)
		return false
	})
	return why
}

// EnsureElders lets the connections that exist in the pod's network namespace, which must be the calling thread's, go on
// past the guard. It is done once for a pod, and once more when its exclusions have changed; with none set, there is
// nothing in the namespace yet. The result is how many connections are just being made, for which it must be called again;
// last says that it will not be.
func (n *Node) EnsureElders(cookie uint64, none, last bool) (pending int, err error) {
	if n.unguarded != nil {
		return 0, nil
	}
	done, changed := n.podPath(cookie, eldersPin), n.podPath(cookie, changedPin)
	program := n.guard.Changed
	if _, err := os.Lstat(done); err != nil {
		program = n.guard.Elders
	} else if _, err := os.Lstat(changed); err != nil {
		return 0, nil
	}
	if !none {
		if pending, err = exemptOpen(program); err != nil {
			return 0, fmt.Errorf("exempt open connections: %w", err)
		}
	}
	if pending > 0 && !last {
		return pending, nil
	}
	if err := makeNote(done); err != nil {
		return 0, fmt.Errorf("note that open connections are exempt: %w", err)
	}
	if err := os.Remove(changed); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, fmt.Errorf("note that open connections are exempt: %w", err)
	}
	return 0, nil
}

// noteChange has EnsureElders look at the pod's connections once more.
func (n *Node) noteChange(cookie uint64) error {
	if err := makeNote(n.podPath(cookie, changedPin)); err != nil {
		return fmt.Errorf("note that the pod's exclusions change: %w", err)
	}
	return nil
}

// makeNote makes a directory, which is all that a BPF file system has beside programs, links and maps.
func makeNote(path string) error {
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

func exemptOpen(program *ebpf.Program) (pending int, err error) {
	it, err := link.AttachIter(link.IterOptions{Program: program})
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

// EnsureGuard checks what arrives from a pod over wires, and over no others. fresh says that nothing runs in the pod yet. It
// must be called in the host's network namespace.
func (n *Node) EnsureGuard(pod Pod, wires []Wire, fresh bool) error {
	if n.unguarded != nil {
		return nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, w := range wires {
		if err := n.ensureWire(pod, w, fresh); err != nil {
			return fmt.Errorf("guard the pod's interface %d: %w", w.Ifindex, err)
		}
	}
	return n.removeGuard(pod.Cookie, wires)
}

// ensureWire leaves one guard on a wire. A process that was killed while it exchanged a filter for a link has left both.
func (n *Node) ensureWire(pod Pod, w Wire, fresh bool) error {
	if !n.knows(pod, w) {
		wire := guardWire{Netns: pod.Cookie, Nsid: int32(w.Nsid), Flags: uint32(pod.flags())}
		if err := n.guard.Wires.Put(uint32(w.Ifindex), wire); err != nil {
			return err
		}
	}
	n.bare.Delete(w.Ifindex)
	mark := n.wirePath(pod.Cookie, filterPin, w)
	linked, err := n.updateGuard(pod.Cookie, w)
	if err == nil && !linked {
		linked, err = n.attachGuard(pod.Cookie, w, mark, fresh)
	}
	if !linked || err != nil {
		return err
	}
	if _, err := os.Lstat(mark); err == nil {
		return unguard(mark, w.Ifindex, n.cfg.Filters)
	}
	return nil
}

// attachGuard uses a filter for a pod that starts. To make the first filter, the kernel takes the interface out of service for
// a moment and loses what is sent to it; so a pod that runs gets a link, which takes the longer way, where the kernel has links.
func (n *Node) attachGuard(cookie uint64, w Wire, mark string, fresh bool) (linked bool, err error) {
	_, err = os.Lstat(mark)
	filtered, taken := err == nil, false
	if (fresh || filtered) && !n.shared(w) {
		if taken, err = n.filter(mark, w); !taken || err != nil {
			return false, err
		}
	}
	err = n.linkGuard(cookie, w)
	if !errors.Is(err, ebpf.ErrNotSupported) {
		return err == nil, err
	}
	if !taken {
		taken, err = n.filter(mark, w)
	}
	if !taken {
		return false, err
	}
	n.bare.Store(w.Ifindex, fmt.Errorf("interface %d has filters of somebody else, beside which the guard needs Linux 6.6", w.Ifindex))
	return false, nil
}

// filter guards a wire by a filter, which its mark tells of from before. taken is that of Filters.Ensure.
func (n *Node) filter(mark string, w Wire) (taken bool, err error) {
	if err := makeNote(mark); err != nil {
		return false, fmt.Errorf("note that the interface has a filter: %w", err)
	}
	return n.cfg.Filters.Ensure(w.Ifindex, n.guard.Guard)
}

// updateGuard replaces the program of the link on a wire, if there is one.
func (n *Node) updateGuard(cookie uint64, w Wire) (linked bool, err error) {
	old, err := link.LoadPinnedLink(n.wirePath(cookie, guardPin, w), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("open pinned link: %w", err)
	}
	defer old.Close()
	if guards(old, w) {
		return true, old.Update(n.guard.Guard)
	}
	if err := old.Unpin(); err != nil {
		return false, fmt.Errorf("unpin a link to an interface that is gone: %w", err)
	}
	return false, nil
}

// shared tells whether others have tcx programs on a wire. Those decide before any filter, so that ours has to be one of
// them, and the first.
func (n *Node) shared(w Wire) bool {
	programs, err := link.QueryPrograms(link.QueryOptions{Target: w.Ifindex, Attach: ebpf.AttachTCXIngress})
	return err == nil && len(programs.Programs) > 0 // there is no tcx, or none here
}

// linkGuard gives ebpf.ErrNotSupported before Linux 6.6.
func (n *Node) linkGuard(cookie uint64, w Wire) error {
	made, err := n.attachTCX(link.TCXOptions{
		Interface: w.Ifindex, Program: n.guard.Guard, Attach: ebpf.AttachTCXIngress, Anchor: link.Head(),
	})
	if err != nil {
		return err
	}
	defer made.Close()
	return made.Pin(n.wirePath(cookie, guardPin, w))
}

// wirePath is where a pod's pin of a kind is for a wire.
func (n *Node) wirePath(cookie uint64, kind string, w Wire) string {
	return n.podPath(cookie, kind+strconv.Itoa(w.Ifindex))
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

// Guarded tells whether the pod's wires are guarded as EnsureGuard would, where that can be. It must be called in the
// host's network namespace.
func (n *Node) Guarded(pod Pod, wires []Wire) (bool, error) {
	if n.unguarded != nil {
		return true, nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if pins, err := n.guardPins(pod.Cookie); err != nil || len(pins) != len(wires) {
		return false, err
	}
	if _, err := os.Lstat(n.podPath(pod.Cookie, changedPin)); err == nil {
		return false, nil
	}
	for _, w := range wires {
		if !n.knows(pod, w) {
			return false, nil
		}
		if ok, err := n.isGuarded(pod.Cookie, w); !ok || err != nil {
			return false, err
		}
	}
	return true, nil
}

func (n *Node) isGuarded(cookie uint64, w Wire) (bool, error) {
	l, err := link.LoadPinnedLink(n.wirePath(cookie, guardPin, w), nil)
	if err == nil {
		defer l.Close()
		return guards(l, w), nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("open pinned link: %w", err)
	}
	if n.shared(w) {
		return false, nil
	}
	if _, ok := n.bare.Load(w.Ifindex); ok {
		return true, nil // as far as it can be
	}
	return n.cfg.Filters.Has(w.Ifindex, n.guard.Guard)
}

// guardPins are the pins of a pod's guards of either kind, by the index of their interface.
func (n *Node) guardPins(cookie uint64) (map[string]int, error) {
	entries, err := os.ReadDir(n.podPath(cookie))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	pins := map[string]int{}
	for _, entry := range entries {
		if index, ok := pinnedIndex(entry.Name()); ok {
			pins[n.podPath(cookie, entry.Name())] = index
		}
	}
	return pins, nil
}

// pinnedIndex reads the name of a guard's pin.
func pinnedIndex(name string) (ifindex int, ok bool) {
	kind, index, _ := strings.Cut(name, "-")
	ifindex, err := strconv.Atoi(index)
	return ifindex, err == nil && (kind+"-" == guardPin || kind+"-" == filterPin)
}

// removeGuard ends the guard of a pod, but for the wires given.
func (n *Node) removeGuard(cookie uint64, but []Wire) error {
	pins, err := n.guardPins(cookie)
	if err != nil {
		return err
	}
	var errs []error
	for pin, index := range pins {
		if slices.ContainsFunc(but, func(w Wire) bool { return w.Ifindex == index }) {
			continue
		}
		if err := unguard(pin, index, n.cfg.Filters); err != nil {
			errs = append(errs, fmt.Errorf("detach the pod's guard: %w", err))
		}
		n.bare.Delete(index)
		var have guardWire
		if n.guard.Wires != nil && n.guard.Wires.Lookup(uint32(index), &have) == nil && have.Netns == cookie {
			errs = append(errs, n.guard.Wires.Delete(uint32(index)))
		}
	}
	return errors.Join(errs...)
}

// forgetWires forgets what removeGuard does not find by a pin: a process was killed between the two. It looks at every
// pod's wires.
func (n *Node) forgetWires(cookie uint64) error {
	if n.guard.Wires == nil {
		return nil
	}
	err := deleteEach(n.guard.Wires, func(_ uint32, wire guardWire) bool { return wire.Netns == cookie })
	if err != nil {
		return fmt.Errorf("forget the pod's interfaces: %w", err)
	}
	return nil
}

// unguard ends what a pin stands for.
func unguard(pin string, index int, filters Filters) error {
	if strings.HasPrefix(filepath.Base(pin), guardPin) {
		return detach(pin)
	}
	if err := filters.Remove(index); err != nil {
		return err
	}
	return os.Remove(pin)
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
