package redirect

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/bpf"
	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// halfMade bounds the wait for connections that are being made when a running pod is enrolled.
const halfMade = time.Second

// ebpf redirects by the programs of package bpf, with no state for a connection and none for a packet.
type ebpf struct {
	node *bpf.Node
	host *os.File // the host's network namespace; nil means this process's
	// ends asks that namespace, in which the pods' interfaces have their other ends.
	ends *netlink.Handle
}

// newEBPF makes the node ready: programs in the cgroup, probe sources on the host's lo.
func newEBPF(cfg Config, host uint64) (backend, error) {
	cgroup, err := cgroupOf(cfg)
	if err != nil {
		return nil, err
	}
	var ends *netlink.Handle
	err = netns.Do(cfg.HostNetns, func() (err error) {
		if err = ensureHost(); err == nil {
			ends, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("prepare the host for probes: %w", err)
	}
	node, err := bpf.Open(bpf.Config{
		Dir: cfg.BPFFS, Mounts: cfg.HostMounts, Cgroup: cgroup, HostNetns: host, Probe4: ProbeSource4, Probe6: ProbeSource6, Filters: filters{ends},
	})
	if err != nil {
		ends.Close()
		return nil, fmt.Errorf("redirection by eBPF (which needs Linux 5.18 or later): %w", err)
	}
	return &ebpf{node, cfg.HostNetns, ends}, nil
}

// cgroupOf is the cgroup2 directory that the node's programs are attached to.
func cgroupOf(cfg Config) (string, error) {
	if cfg.Cgroup != "" {
		return cfg.Cgroup, nil
	}
	root, err := hostCgroup2("/proc/1")
	if err != nil {
		return "", fmt.Errorf("redirection by eBPF needs cgroup2: %w", err)
	}
	return root, nil
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

func (e *ebpf) prepare(pod Pod, cookie uint64) error {
	if _, err := e.settle(pod); err != nil {
		return err
	}
	return e.node.Prepare(cookie)
}

// settle makes the rules true that do nothing without the pod's programs, and lists the pod's interfaces.
func (e *ebpf) settle(pod Pod) (links []netlink.Link, err error) {
	rules := Plan(PodConfig{Mode: EBPF, IPs: pod.IPs})
	if pod.Fresh && !pod.Exclude.DNS {
		// Nobody asks for a name yet.
		rules.Rules = append(rules.Rules, rules.DNS...)
	}
	err = within(pod.Netns, func(s space) error {
		if err := s.ensure(rules); err != nil {
			return err
		}
		links, err = s.links()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("prepare the pod's network namespace: %w", err)
	}
	return links, nil
}

// ensure redirects first and guards then: what the pod has connected before either goes on, and nothing that it connects
// in between goes round the proxy.
func (e *ebpf) ensure(pod Pod, cookie uint64) error {
	links, err := e.settle(pod)
	if err != nil {
		return err
	}
	target, err := describe(pod, cookie)
	if err != nil {
		return err
	}
	if err := e.node.EnsurePod(pod.Netns, target); err != nil {
		return err
	}
	if err := e.exemptElders(pod, cookie); err != nil {
		return err
	}
	err = netns.Do(e.host, func() error {
		wires, _, err := wiresOf(e.ends, pod, links)
		if err != nil {
			return err
		}
		return e.node.EnsureGuard(target, wires, pod.Fresh)
	})
	if err != nil || pod.Fresh {
		return err
	}
	return within(pod.Netns, func(s space) error {
		rules := Plan(PodConfig{Mode: EBPF, IPs: pod.IPs}).DNS
		if pod.Exclude.DNS {
			return s.removeRules(rules)
		}
		return s.addRules(rules)
	})
}

// describe is the pod as its programs are to know it.
func describe(pod Pod, cookie uint64) (bpf.Pod, error) {
	target := bpf.Pod{Cookie: cookie, UID: pod.UID, IPs: pod.IPs, Exclude: pod.Exclude}
	if len(pod.Exclude.Interfaces) == 0 {
		return target, nil
	}
	err := netns.Do(pod.Netns, func() (err error) {
		target.Devices, err = devices(pod.Exclude.Interfaces)
		return err
	})
	return target, err
}

// exemptElders lets the connections that a running pod has open go on. Those that are half made become known by their
// last packet, for which it waits a while.
func (e *ebpf) exemptElders(pod Pod, cookie uint64) error {
	if pod.Fresh {
		_, err := e.node.EnsureElders(cookie, true, true)
		return err
	}
	for deadline := time.Now().Add(halfMade); ; time.Sleep(halfMade / 20) {
		var pending int
		err := netns.Do(pod.Netns, func() (err error) {
			pending, err = e.node.EnsureElders(cookie, false, time.Now().After(deadline))
			return err
		})
		if err != nil || pending == 0 {
			return err
		}
	}
}

func (e *ebpf) holds(pod Pod, cookie uint64) (bool, error) {
	target, err := describe(pod, cookie)
	if err != nil {
		return false, err
	}
	if ok, err := e.node.Holds(target); !ok || err != nil {
		return false, err
	}
	plan := Plan(PodConfig{Mode: EBPF, IPs: pod.IPs})
	if !pod.Exclude.DNS {
		plan.Rules = append(plan.Rules, plan.DNS...)
	}
	var links []netlink.Link
	var rules, guarded bool
	err = within(pod.Netns, func(s space) error {
		if rules, err = s.held(plan); !rules || err != nil {
			return err
		}
		links, err = s.links()
		return err
	})
	if !rules || err != nil {
		return false, err
	}
	err = netns.Do(e.host, func() error {
		wires, _, err := wiresOf(e.ends, pod, links)
		if err != nil {
			return err
		}
		guarded, err = e.node.Guarded(target, wires)
		return err
	})
	return guarded, err
}

func (e *ebpf) refuse(uid string) error { return e.node.Refuse(uid) }

func (e *ebpf) admit(uid string) error { return e.node.Admit(uid) }

func (e *ebpf) refused() ([]string, error) { return e.node.Refused() }

func (e *ebpf) guard() error { return e.node.Unguarded() }

func (e *ebpf) unguarded(pod Pod) (interfaces []string, err error) {
	if e.node.Unguarded() != nil {
		return nil, nil
	}
	var links []netlink.Link
	err = within(pod.Netns, func(s space) error {
		links, err = s.links()
		return err
	})
	if err != nil {
		return nil, err
	}
	_, interfaces, err = wiresOf(e.ends, pod, links)
	return interfaces, err
}

func (e *ebpf) attempts() (func() (bpf.Attempt, error), func() error, error) {
	return e.node.Attempts()
}

// release first lets the pod's queries go to its resolvers again.
func (e *ebpf) release(cookie uint64, ns *os.File) error {
	var err error
	if ns != nil {
		err = within(ns, func(s space) error { return s.removeRules(Plan(PodConfig{Mode: EBPF}).DNS) })
	}
	return errors.Join(err, netns.Do(e.host, func() error { return e.node.RemovePod(cookie) }))
}

func (e *ebpf) remove(ns *os.File) error {
	return within(ns, func(s space) error { return s.remove(Plan(PodConfig{Mode: EBPF})) })
}

func (e *ebpf) prune(keep func(cookie uint64) bool) error {
	return netns.Do(e.host, func() error { return e.node.Prune(keep) })
}

func (e *ebpf) pods() ([]bpf.Pod, error) { return e.node.Pods() }

func (e *ebpf) ensureProxy(pid int) error { return e.node.EnsureProxy(pid) }

func (e *ebpf) counters() (map[string]uint64, error) { return e.node.Counters() }

func (e *ebpf) stock(ctx context.Context) error { return e.node.Stock(ctx) }

func (e *ebpf) close() error {
	e.ends.Close()
	return e.node.Close()
}
