package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// errNoNetns says that a pod has no network namespace that can be found, as before its sandbox is made.
var errNoNetns = errors.New("the pod's network namespace is not found")

// finder finds the network namespaces of pods that run already.
type finder struct {
	// proc is a proc file system that shows the node's processes.
	proc string
	// dir is where the container runtime keeps files of network namespaces.
	dir string
	// host is the host's network namespace.
	host uint64
}

// open opens a pod's network namespace: where it was last seen, else that of a process in the pod's cgroup, else one
// of the runtime's that has the pod's address. Whatever is opened has the pod's addresses.
func (f finder) open(rec record, uids ...string) (*os.File, string, error) {
	if rec.Netns != "" {
		if ns, err := netns.Open(rec.Netns); err == nil {
			if cookie, err := netns.Cookie(ns); err == nil && cookie == rec.Cookie {
				return ns, rec.Netns, nil
			}
			ns.Close()
		}
	}
	if len(rec.IPs) == 0 {
		return nil, "", errNoNetns
	}
	candidates, err := f.processes(append(uids, rec.UID))
	if err != nil {
		return nil, "", err
	}
	files, err := filepath.Glob(filepath.Join(f.dir, "*"))
	if err != nil {
		return nil, "", err
	}
	for _, path := range append(candidates, files...) {
		ns, err := netns.Open(path)
		if err != nil {
			continue // a process that has ended, or a file of another kind
		}
		if f.has(ns, rec.IPs) {
			return ns, path, nil
		}
		ns.Close()
	}
	return nil, "", errNoNetns
}

// processes lists the network namespaces of processes whose cgroup is a pod's. The kubelet names cgroups after the
// pod's UID; its systemd driver writes underscores in it.
func (f finder) processes(uids []string) ([]string, error) {
	var names []string
	for _, uid := range uids {
		if uid != "" {
			names = append(names, "pod"+uid, "pod"+strings.ReplaceAll(uid, "-", "_"))
		}
	}
	entries, err := os.ReadDir(f.proc)
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var found []string
	for _, entry := range entries {
		if _, err := strconv.Atoi(entry.Name()); err != nil {
			continue
		}
		cgroups, err := os.ReadFile(filepath.Join(f.proc, entry.Name(), "cgroup"))
		if errors.Is(err, fs.ErrNotExist) || err != nil {
			continue // the process has ended
		}
		if slices.ContainsFunc(names, func(name string) bool { return strings.Contains(string(cgroups), name) }) {
			found = append(found, filepath.Join(f.proc, entry.Name(), "ns", "net"))
		}
	}
	return found, nil
}

// has tells whether a namespace, which must not be the host's, has one of the addresses on an interface.
func (f finder) has(ns *os.File, ips []netip.Addr) bool {
	cookie, err := netns.Cookie(ns)
	if err != nil || cookie == f.host {
		return false
	}
	var addrs []netlink.Addr
	err = netns.Do(ns, func() error {
		addrs, err = netlink.AddrList(nil, netlink.FAMILY_ALL)
		return err
	})
	return err == nil && slices.ContainsFunc(addrs, func(a netlink.Addr) bool {
		return slices.ContainsFunc(ips, func(ip netip.Addr) bool { return a.IP.Equal(net.IP(ip.AsSlice())) })
	})
}
