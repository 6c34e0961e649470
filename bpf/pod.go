package bpf

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"

	"github.com/cilium/ebpf"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// MaxPodIPs is how many addresses a pod may have.
const MaxPodIPs = len(connectPod{}.Addrs)

// Pod is one pod of the mesh, as the kernel knows it.
type Pod struct {
	// Cookie is the cookie of the pod's network namespace.
	Cookie uint64
	// UID is the pod's, at most 64 bytes.
	UID string
	// IPs are the pod's addresses.
	IPs []netip.Addr
	// Exclude is what the pod leaves out, and Devices the interfaces that it names. What Pods gives does not tell.
	Exclude mesh.Exclusions
	Devices Devices
}

// Prepare makes sure that the proxy can put its listeners for the pod in place (OpenListeners). No traffic is redirected
// by it.
func (n *Node) Prepare(cookie uint64) error {
	if err := os.MkdirAll(n.podPath(cookie), 0o700); err != nil {
		return fmt.Errorf("make the pod's pin directory: %w", err)
	}
	return nil
}

// EnsurePod redirects the pod's TCP, in ns, its network namespace. It is idempotent, and replaces an older program
// without a gap. The routes that cni/redirect makes must be there.
func (n *Node) EnsurePod(ns *os.File, pod Pod) error {
	value, err := encodePod(pod)
	if err != nil {
		return err
	}
	if err := n.Prepare(pod.Cookie); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	var old connectPod
	known := true
	if err := n.maps.Pods.Lookup(pod.Cookie, &old); errors.Is(err, ebpf.ErrKeyNotExist) {
		known = false
	} else if err != nil {
		return fmt.Errorf("look up the pod: %w", err)
	}
	if known && old.Exclusions != value.Exclusions {
		if err := n.noteChange(pod.Cookie); err != nil {
			return err
		}
	}
	wanted := compile(pod)
	if err := n.putExclusions(wanted); err != nil {
		return err
	}
	if err := n.ensureLookup(ns, pod.Cookie); err != nil {
		return err
	}
	if err := n.putPodAddrs(pod.Cookie, value.Addrs[:value.AddrCount], old.Addrs[:old.AddrCount]); err != nil {
		return err
	}
	if err := n.maps.Pods.Put(pod.Cookie, value); err != nil {
		return fmt.Errorf("set the pod: %w", err)
	}
	// Entries of a pod that has none in force do nothing, and go with the pod.
	if (value.Flags|old.Flags)&connectPodFlagsPOD_EXCLUSIONS == 0 {
		return nil
	}
	return n.dropExclusions(pod.Cookie, wanted)
}

// putPodAddrs gives addresses to a pod, and takes those that it had away.
func (n *Node) putPodAddrs(cookie uint64, addrs, old []connectAddr) error {
	for _, a := range addrs {
		if err := n.maps.PodAddrs.Put(a, cookie); err != nil {
			return fmt.Errorf("set a pod address: %w", err)
		}
	}
	return n.deletePodAddrs(slices.DeleteFunc(slices.Clone(old), func(a connectAddr) bool { return slices.Contains(addrs, a) }))
}

// removePodAddrs takes all addresses of a pod away, also those of one that was half made. It looks at every pod's.
func (n *Node) removePodAddrs(cookie uint64) error {
	err := deleteEach(n.maps.PodAddrs, func(_ connectAddr, owner uint64) bool { return owner == cookie })
	if err != nil {
		return fmt.Errorf("remove the pod's addresses: %w", err)
	}
	return nil
}

func (n *Node) deletePodAddrs(addrs []connectAddr) error {
	for _, a := range addrs {
		if err := n.maps.PodAddrs.Delete(a); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("remove a pod address: %w", err)
		}
	}
	return nil
}

// RemovePod ends the redirection of new connections. Established ones go on for as long as the pod's routes stay. It
// must be called in the host's network namespace. It is no error when there is nothing.
func (n *Node) RemovePod(cookie uint64) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	errs := []error{n.removeGuard(cookie, nil), n.forgetWires(cookie)}
	if err := n.maps.Pods.Delete(cookie); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		errs = append(errs, fmt.Errorf("remove the pod: %w", err))
	}
	// Unpinned alone, the program would go on for a moment, and refuse what finds no listener.
	if err := detach(n.podPath(cookie, lookupPin)); err != nil {
		errs = append(errs, fmt.Errorf("detach the pod's program: %w", err))
	} else {
		errs = append(errs, n.lookups.free(cookie, func(uint32) bool { return true }))
	}
	for slot := range slots {
		if err := n.maps.Listeners.Delete(slot.key(cookie)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("remove a listener of the pod: %w", err))
		}
	}
	errs = append(errs, n.removePodAddrs(cookie), n.dropExclusions(cookie, entries{}))
	if err := os.RemoveAll(n.podPath(cookie)); err != nil {
		errs = append(errs, fmt.Errorf("unpin the pod's program: %w", err))
	}
	return errors.Join(errs...)
}

// Pods lists the pods that the kernel redirects, whichever process set them up: both programs know them.
func (n *Node) Pods() ([]Pod, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var pods []Pod
	var cookie uint64
	var value connectPod
	entries := n.maps.Pods.Iterate()
	for entries.Next(&cookie, &value) {
		captured, err := n.captured(cookie)
		if err != nil {
			return nil, err
		}
		if captured {
			pods = append(pods, decodePod(cookie, value))
		}
	}
	if err := entries.Err(); err != nil {
		return nil, fmt.Errorf("list pods: %w", err)
	}
	return pods, nil
}

// Holds tells whether the kernel redirects the pod as EnsurePod would make it.
func (n *Node) Holds(pod Pod) (bool, error) {
	want, err := encodePod(pod)
	if err != nil {
		return false, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	var have connectPod
	if err := n.maps.Pods.Lookup(pod.Cookie, &have); errors.Is(err, ebpf.ErrKeyNotExist) {
		return false, nil
	} else if err != nil {
		return false, fmt.Errorf("look up the pod: %w", err)
	}
	if have != want || !n.lookups.current(pod.Cookie) {
		return false, nil
	}
	return n.captured(pod.Cookie)
}

// Prune removes every trace of pods that keep says no to, also what was left half made. It must be called in the host's
// network namespace.
func (n *Node) Prune(keep func(cookie uint64) bool) error {
	cookies, err := n.traces()
	if err != nil {
		return err
	}
	var errs []error
	for cookie := range cookies {
		if !keep(cookie) {
			errs = append(errs, n.RemovePod(cookie))
		}
	}
	return errors.Join(errs...)
}

// traces lists the cookies that any map or pin knows.
func (n *Node) traces() (map[uint64]bool, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	cookies := map[uint64]bool{}
	var cookie uint64
	var value connectPod
	pods := n.maps.Pods.Iterate()
	for pods.Next(&cookie, &value) {
		cookies[cookie] = true
	}
	var addr connectAddr
	addrs := n.maps.PodAddrs.Iterate()
	for addrs.Next(&addr, &cookie) {
		cookies[cookie] = true
	}
	if err := errors.Join(pods.Err(), addrs.Err()); err != nil {
		return nil, fmt.Errorf("list pods: %w", err)
	}
	for _, cookie := range n.lookups.cookies() {
		cookies[cookie] = true
	}
	pins, err := os.ReadDir(n.path("pods"))
	if err != nil {
		return nil, fmt.Errorf("list pinned pods: %w", err)
	}
	for _, pin := range pins {
		if cookie, err := strconv.ParseUint(pin.Name(), 10, 64); err == nil {
			cookies[cookie] = true
		}
	}
	return cookies, nil
}

func (n *Node) podPath(cookie uint64, elements ...string) string {
	return n.path(append([]string{"pods", strconv.FormatUint(cookie, 10)}, elements...)...)
}

func encodePod(pod Pod) (connectPod, error) {
	value := connectPod{AddrCount: uint32(len(pod.IPs)), Flags: pod.flags(), Exclusions: pod.fingerprint()}
	if len(pod.IPs) == 0 || len(pod.IPs) > MaxPodIPs {
		return value, fmt.Errorf("pod has %d addresses, want 1 to %d", len(pod.IPs), MaxPodIPs)
	}
	if len(pod.UID) > len(value.Uid) {
		return value, fmt.Errorf("pod UID is longer than %d bytes", len(value.Uid))
	}
	copy(value.Uid[:], pod.UID)
	for i, ip := range pod.IPs {
		value.Addrs[i] = toAddr(ip)
	}
	return value, nil
}

func decodePod(cookie uint64, value connectPod) Pod {
	pod := Pod{Cookie: cookie, UID: string(bytes.TrimRight(value.Uid[:], "\x00"))}
	for _, a := range value.Addrs[:min(int(value.AddrCount), MaxPodIPs)] {
		pod.IPs = append(pod.IPs, fromAddr(a))
	}
	return pod
}
