package bpf

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// DefaultDir is where programs, links and maps are pinned unless told otherwise.
const DefaultDir = "/sys/fs/bpf/fairlead"

// Config says where the node's programs go.
type Config struct {
	// Dir is the directory of a BPF file system to pin everything in; one is mounted when Dir is on none.
	Dir string
	// Mounts is a file of the mount namespace in which one is mounted; empty means this process's.
	Mounts string
	// Cgroup is the cgroup2 directory whose processes' connects are seen: normally the root of the hierarchy.
	Cgroup string
	// HostNetns is the cookie of the network namespace that the kubelet runs in.
	HostNetns uint64
	// Probe4 and Probe6 are the addresses that the kubelet's probes of pods of the mesh come from.
	Probe4, Probe6 netip.Addr
	// Filters puts the guard on interfaces.
	Filters Filters
}

// Node is the node's part of redirection: the programs in the cgroup, and the maps shared with all pods. Its methods
// are safe for concurrent use.
type Node struct {
	cfg     Config
	lookups *lookups
	guard   guardObjects
	// unguarded is why there is no guard, or nil.
	unguarded error
	// attachTCX is link.AttachTCX, but in tests.
	attachTCX func(link.TCXOptions) (link.Link, error)
	// bare has, by the index of its interface, each wire that this kernel cannot guard, and the error that says why.
	bare sync.Map

	mu   sync.Mutex
	maps connectMaps
}

// Open makes sure that the node's programs are loaded and attached, taking over what an earlier process pinned, and
// replacing its programs without a gap. Close leaves everything in place.
func Open(cfg Config) (*Node, error) {
	if err := ensureMount(cfg.Dir, cfg.Mounts); err != nil {
		return nil, err
	}
	n := &Node{cfg: cfg, attachTCX: link.AttachTCX}
	for _, dir := range []string{n.path("maps"), n.path("links"), n.path("pods"), n.path("refused")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("make pin directory: %w", err)
		}
	}
	spec, err := loadConnect()
	if err != nil {
		return nil, err
	}
	for _, m := range spec.Maps {
		m.Pinning = ebpf.PinByName
	}
	var objects connectObjects
	opts := &ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: n.path("maps")}}
	if err := spec.LoadAndAssign(&objects, opts); err != nil {
		return nil, fmt.Errorf("load the connect programs: %w", err)
	}
	n.maps = objects.connectMaps
	defer objects.connectPrograms.Close()
	n.lookups, err = newLookups(n.maps)
	if err := errors.Join(err, n.start(&objects.connectPrograms), n.openGuard()); err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

// start fills in the node's settings and attaches the programs.
func (n *Node) start(programs *connectPrograms) error {
	host := connectHost{Netns: n.cfg.HostNetns, Probe4: toAddr(n.cfg.Probe4), Probe6: toAddr(n.cfg.Probe6)}
	if err := n.maps.HostConfig.Put(uint32(0), host); err != nil {
		return fmt.Errorf("set the probe source: %w", err)
	}
	if err := n.ensureWorkloads(); err != nil {
		return err
	}
	for _, a := range []struct {
		pin     string
		attach  ebpf.AttachType
		program *ebpf.Program
	}{
		{"connect4", ebpf.AttachCGroupInet4Connect, programs.Connect4},
		{"connect6", ebpf.AttachCGroupInet6Connect, programs.Connect6},
	} {
		if err := ensureCgroupLink(n.path("links", a.pin), n.cfg.Cgroup, a.attach, a.program); err != nil {
			return fmt.Errorf("attach %s to %s: %w", a.pin, n.cfg.Cgroup, err)
		}
	}
	return nil
}

// ensureCgroupLink updates the link pinned at pin, or makes it when there is none or it is another cgroup's.
func ensureCgroupLink(pin, cgroup string, attach ebpf.AttachType, program *ebpf.Program) error {
	id, err := CgroupID(cgroup)
	if err != nil {
		return err
	}
	old, err := link.LoadPinnedLink(pin, nil)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("open pinned link: %w", err)
	}
	if err == nil {
		defer old.Close()
		info, err := old.Info()
		if err != nil {
			return err
		}
		if attached := info.Cgroup(); attached != nil && attached.CgroupId == id {
			return old.Update(program)
		}
	}
	made, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: attach, Program: program})
	if err != nil {
		return err
	}
	defer made.Close()
	if old != nil {
		// Only now, so that one of the two is always attached.
		if err := old.Unpin(); err != nil {
			return fmt.Errorf("unpin the link to another cgroup: %w", err)
		}
	}
	return made.Pin(pin)
}

// detach ends a pinned link at once. It is no error when there is none, or what it is attached to is gone.
func detach(pin string) error {
	l, err := link.LoadPinnedLink(pin, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open pinned link: %w", err)
	}
	defer l.Close()
	if err := l.Detach(); err != nil && !errors.Is(err, unix.ENOLINK) {
		return err
	}
	return l.Unpin()
}

// Close releases this process's handles. Programs stay attached.
func (n *Node) Close() error {
	errs := []error{n.maps.Close()}
	if n.lookups != nil {
		errs = append(errs, n.lookups.close())
	}
	if n.unguarded == nil {
		errs = append(errs, n.guard.Close())
	}
	return errors.Join(errs...)
}

// Counters returns what the programs have counted since they were first loaded, by name.
func (n *Node) Counters() (map[string]uint64, error) {
	names := map[connectCounter]string{
		connectCounterOUTBOUND_REDIRECTED: "outbound_redirected",
		connectCounterOUTBOUND_REFUSED:    "outbound_refused",
		connectCounterFORGED_MARK:         "forged_mark",
		connectCounterINBOUND_REDIRECTED:  "inbound_redirected",
		connectCounterINBOUND_REFUSED:     "inbound_refused",
		connectCounterPROBES:              "probes",
		connectCounterBYPASS_DROPPED:      "bypass_dropped",
		connectCounterUNCAPTURED_DROPPED:  "uncaptured_dropped",
		connectCounterDNS_REDIRECTED:      "dns_redirected",
		connectCounterDNS_DROPPED:         "dns_dropped",
		connectCounterOUTBOUND_EXCLUDED:   "outbound_excluded",
		connectCounterINBOUND_EXCLUDED:    "inbound_excluded",
	}
	result := make(map[string]uint64, len(names))
	for counter, name := range names {
		var perCPU []uint64
		if err := n.maps.Counters.Lookup(counter, &perCPU); err != nil {
			return nil, fmt.Errorf("read counter %s: %w", name, err)
		}
		for _, v := range perCPU {
			result[name] += v
		}
	}
	return result, nil
}

// EnsureProxy exempts the process pid, and whatever else runs in the same cgroup, from redirection when its sockets have
// the proxy's mark. Cgroups of earlier proxies stay exempt: their sockets may live on in another process, and the kernel does
// not use a cgroup's number twice.
//
// pid is one of this process's pid namespace. The cgroup is found by looking for the pid in the tree below the cgroup
// that the programs are attached to, because paths in /proc/PID/cgroup depend on cgroup namespaces.
func (n *Node) EnsureProxy(pid int) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	var proxy uint64
	alive := map[uint64]bool{}
	err := walkCgroups(n.cfg.Cgroup, func(path string, id uint64) error {
		alive[id] = true
		has, err := hasProcess(path, pid)
		if has {
			proxy = id
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("find the cgroup of process %d: %w", pid, err)
	}
	if proxy == 0 {
		return fmt.Errorf("process %d is in no cgroup below %s, so its connections cannot be told from those of "+
			"applications: attach to a cgroup that holds both", pid, n.cfg.Cgroup)
	}
	err = n.maps.Proxies.Put(proxy, uint32(1))
	if errors.Is(err, unix.E2BIG) {
		if err := n.forgetProxies(alive); err != nil {
			return err
		}
		err = n.maps.Proxies.Put(proxy, uint32(1))
	}
	if err != nil {
		return fmt.Errorf("exempt the proxy's cgroup: %w", err)
	}
	return nil
}

// forgetProxies makes room by forgetting cgroups that no longer exist.
func (n *Node) forgetProxies(alive map[uint64]bool) error {
	if err := deleteEach(n.maps.Proxies, func(id uint64, _ uint32) bool { return !alive[id] }); err != nil {
		return fmt.Errorf("forget proxies' cgroups: %w", err)
	}
	return nil
}

// deleteEach deletes the entries of a map that gone says yes to, once it has seen all: an iteration whose entries go may
// begin anew.
func deleteEach[K comparable, V any](m *ebpf.Map, gone func(K, V) bool) error {
	var key K
	var value V
	keys := map[K]bool{}
	all := m.Iterate()
	for all.Next(&key, &value) {
		if gone(key, value) {
			keys[key] = true
		}
	}
	if err := all.Err(); err != nil {
		return fmt.Errorf("list entries: %w", err)
	}
	for key := range keys {
		if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("delete an entry: %w", err)
		}
	}
	return nil
}

// ensureWorkloads tells the programs below which cgroups the kubelet's pods run.
func (n *Node) ensureWorkloads() error {
	return walkCgroups(n.cfg.Cgroup, func(path string, id uint64) error {
		name := filepath.Base(path)
		if name != "kubepods" && name != "kubepods.slice" {
			return nil
		}
		if err := n.maps.Workloads.Put(id, uint32(1)); err != nil {
			return fmt.Errorf("set the pods' cgroup: %w", err)
		}
		return fs.SkipDir
	})
}

// Remove detaches and unpins everything under dir, and unmounts the BPF file system if Open mounted it, in mounts as
// Config has it. It must be called in the host's network namespace. It is no error when there is nothing.
func Remove(dir, mounts string, filters Filters) error {
	if !isBPFFS(dir) {
		return inMounts(mounts, func() error { return removeEmpty(dir) }) // what one that was killed has left
	}
	links, err := filepath.Glob(filepath.Join(dir, "links", "*"))
	if err != nil {
		return err
	}
	pods, err := filepath.Glob(filepath.Join(dir, "pods", "*", "*"))
	if err != nil {
		return err
	}
	refused, err := filepath.Glob(filepath.Join(dir, "refused", "*"))
	if err != nil {
		return err
	}
	for _, pin := range slices.Concat(links, pods, refused) {
		if name := filepath.Base(pin); name == eldersPin || name == changedPin {
			continue
		}
		end := func() error { return detach(pin) }
		if index, ok := pinnedIndex(filepath.Base(pin)); ok {
			end = func() error { return unguard(pin, index, filters) }
		}
		if err := end(); err != nil {
			return fmt.Errorf("detach %s: %w", pin, err)
		}
	}
	for _, name := range []string{"links", "pods", "refused", "maps"} {
		if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("unpin: %w", err)
		}
	}
	return inMounts(mounts, func() error { return unmount(dir) })
}

func (n *Node) path(elements ...string) string {
	return filepath.Join(append([]string{n.cfg.Dir}, elements...)...)
}
