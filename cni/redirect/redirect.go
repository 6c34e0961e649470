package redirect

// A pod's TCP reaches the node proxy in these steps:
//
//  1. Plan (plan.go) decides the rules of the pod's network namespace: sysctls, ip rules, routes.
//  2. Prepare makes them true (apply.go) and gives the proxy a place for its listeners.
//  3. Ensure attaches the pod's programs. From then on bpf/connect.c marks what the application connects, the rules bring
//     marked packets to lo, and bpf/lookup.c hands them, and what arrives from outside, to the proxy's listeners.
//
// Next: bpf/connect.c

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/fairlead-mesh/fairlead/bpf"
	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// Config says where redirection finds the node.
type Config struct {
	// BPFFS is the directory for pins; see bpf.Config.
	BPFFS string
	// Cgroup is the cgroup2 directory under which the node's pods run; empty means the root of the hierarchy that process
	// 1 sees.
	Cgroup string
	// HostNetns is the network namespace that the kubelet runs in; nil means this process's.
	HostNetns *os.File
}

// Pod is one pod to redirect.
type Pod struct {
	UID string
	// Netns is the pod's network namespace. The caller keeps it and closes it.
	Netns *os.File
	// IPs are the pod's addresses.
	IPs []netip.Addr
}

// Redirector redirects the pods of one node. What it sets up stays when the process ends. Its methods are safe for
// concurrent use.
type Redirector struct {
	cfg  Config
	node *bpf.Node
}

// New makes the node ready: programs in the cgroup, probe sources on the host's lo. The error says what the machine
// lacks.
func New(cfg Config) (*Redirector, error) {
	if cfg.Cgroup == "" {
		root, err := hostCgroup2("/proc/1")
		if err != nil {
			return nil, fmt.Errorf("redirection by eBPF needs cgroup2: %w", err)
		}
		cfg.Cgroup = root
	}
	host, err := netns.Cookie(cfg.HostNetns)
	if err != nil {
		return nil, fmt.Errorf("identify the host's network namespace: %w", err)
	}
	if err := netns.Do(cfg.HostNetns, ensureHost); err != nil {
		return nil, fmt.Errorf("prepare the host for probes: %w", err)
	}
	node, err := bpf.Open(bpf.Config{
		Dir: cfg.BPFFS, Cgroup: cfg.Cgroup, HostNetns: host, Probe4: ProbeSource4, Probe6: ProbeSource6,
	})
	if err != nil {
		return nil, fmt.Errorf("redirection by eBPF (which needs Linux 5.18 or later): %w", err)
	}
	return &Redirector{cfg: cfg, node: node}, nil
}

// hostCgroup2 finds the root of the cgroup2 hierarchy as a process sees it, normally the host's first. What this process
// sees may be no more than the cgroup of its own container.
func hostCgroup2(process string) (string, error) {
	mount, err := bpf.FindCgroup2(filepath.Join(process, "mounts"))
	if err != nil {
		return "", err
	}
	return filepath.Join(process, "root", mount), nil
}

// Prepare does what can be done for a pod without touching its traffic, so that the proxy can put its listeners in
// place before Ensure. It returns the pod's cookie.
func (r *Redirector) Prepare(ctx context.Context, pod Pod) (uint64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	host, err := netns.Cookie(r.cfg.HostNetns)
	if err != nil {
		return 0, err
	}
	cookie, err := netns.Cookie(pod.Netns)
	if err != nil {
		return 0, err
	}
	if cookie == host {
		return 0, errors.New("redirect a pod: it runs in the host's network namespace")
	}
	rules := Plan(PodConfig{IPs: pod.IPs})
	if err := netns.Do(pod.Netns, func() error { return ensure(rules) }); err != nil {
		return 0, fmt.Errorf("prepare the pod's network namespace: %w", err)
	}
	if err := r.node.Prepare(cookie); err != nil {
		return 0, err
	}
	return cookie, nil
}

// Ensure redirects a pod. From its return on, no new TCP connection of the pod, in or out, avoids the proxy; while the
// proxy does not listen they are refused. Connections that exist go on as they are.
func (r *Redirector) Ensure(ctx context.Context, pod Pod) (uint64, error) {
	cookie, err := r.Prepare(ctx, pod)
	if err != nil {
		return 0, err
	}
	if err := r.node.EnsurePod(pod.Netns, bpf.Pod{Cookie: cookie, UID: pod.UID, IPs: pod.IPs}); err != nil {
		return 0, fmt.Errorf("redirect the pod: %w", err)
	}
	return cookie, nil
}

// Holds tells whether the kernel still holds everything that Ensure made for the pod.
func (r *Redirector) Holds(pod Pod) (bool, error) {
	cookie, err := netns.Cookie(pod.Netns)
	if err != nil {
		return false, err
	}
	known, ok, err := r.node.Pod(cookie)
	if err != nil || !ok || known.UID != pod.UID {
		return false, err
	}
	var rules bool
	err = netns.Do(pod.Netns, func() error {
		rules, err = held(Plan(PodConfig{IPs: pod.IPs}))
		return err
	})
	return rules, err
}

// Release ends the redirection of new connections of the pod with that cookie. Redirected connections go on, for which
// the pod's routes stay; they do nothing to packets without the mark.
func (r *Redirector) Release(cookie uint64) error {
	if err := r.node.RemovePod(cookie); err != nil {
		return fmt.Errorf("stop redirecting the pod: %w", err)
	}
	return nil
}

// Remove takes everything away from a pod's network namespace, which ends redirected connections.
func (r *Redirector) Remove(ns *os.File) error {
	cookie, err := netns.Cookie(ns)
	if err != nil {
		return err
	}
	if err := r.Release(cookie); err != nil {
		return err
	}
	if err := netns.Do(ns, func() error { return remove(Plan(PodConfig{})) }); err != nil {
		return fmt.Errorf("clean the pod's network namespace: %w", err)
	}
	return nil
}

// Prune stops redirecting pods whose cookie keep says no to, as those whose network namespace is gone.
func (r *Redirector) Prune(keep func(cookie uint64) bool) error {
	if err := r.node.Prune(keep); err != nil {
		return fmt.Errorf("forget pods that are gone: %w", err)
	}
	return nil
}

// Pods lists the pods that the kernel redirects, also those set up by an earlier process.
func (r *Redirector) Pods() ([]bpf.Pod, error) { return r.node.Pods() }

// EnsureProxy exempts the node proxy, known by the id of its process, from redirection; see bpf.Node.EnsureProxy.
func (r *Redirector) EnsureProxy(pid int) error { return r.node.EnsureProxy(pid) }

// Counters returns what the programs have counted, by name.
func (r *Redirector) Counters() (map[string]uint64, error) { return r.node.Counters() }

// Close releases this process's handles and leaves redirection in force.
func (r *Redirector) Close() error { return r.node.Close() }

// Uninstall removes the node's part: programs, pins and probe sources. Pods are to be removed before.
func Uninstall(cfg Config) error {
	return errors.Join(bpf.Remove(cfg.BPFFS), netns.Do(cfg.HostNetns, removeHost))
}
