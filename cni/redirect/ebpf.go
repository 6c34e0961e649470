package redirect

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/fairlead-mesh/fairlead/bpf"
	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// halfMade bounds the wait for connections that are being made when a running pod is enrolled.
const halfMade = time.Second

// ebpf redirects by the programs of package bpf, with no state for a connection and none for a packet.
type ebpf struct {
	node *bpf.Node
	host *os.File // the host's network namespace; nil means this process's
}

// newEBPF makes the node ready: programs in the cgroup, probe sources on the host's lo.
func newEBPF(cfg Config, host uint64) (backend, error) {
	cgroup, err := cgroupOf(cfg)
	if err != nil {
		return nil, err
	}
	if err := netns.Do(cfg.HostNetns, ensureHost); err != nil {
		return nil, fmt.Errorf("prepare the host for probes: %w", err)
	}
	node, err := bpf.Open(bpf.Config{
		Dir: cfg.BPFFS, Mounts: cfg.HostMounts, Cgroup: cgroup, HostNetns: host, Probe4: ProbeSource4, Probe6: ProbeSource6, Filters: filters{},
	})
	if err != nil {
		return nil, fmt.Errorf("redirection by eBPF (which needs Linux 5.18 or later): %w", err)
	}
	return &ebpf{node, cfg.HostNetns}, nil
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
	rules := Plan(PodConfig{Mode: EBPF, IPs: pod.IPs})
	if err := netns.Do(pod.Netns, func() error { return ensure(rules) }); err != nil {
		return fmt.Errorf("prepare the pod's network namespace: %w", err)
	}
	return e.node.Prepare(cookie)
}

// ensure redirects first and guards then: what the pod has connected before either goes on, and nothing that it connects
// in between goes round the proxy.
func (e *ebpf) ensure(pod Pod, cookie uint64) error {
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
	wires, _, err := wiresOf(e.host, pod)
	if err != nil {
		return err
	}
	if err := netns.Do(e.host, func() error { return e.node.EnsureGuard(target, wires, pod.Fresh) }); err != nil {
		return err
	}
	return netns.Do(pod.Netns, func() error {
		rules := Plan(PodConfig{Mode: EBPF, IPs: pod.IPs}).DNS
		if pod.Exclude.DNS {
			return removeRules(rules)
		}
		return addRules(rules)
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
	for deadline := time.Now().Add(halfMade); ; time.Sleep(halfMade / 20) {
		var pending int
		err := netns.Do(pod.Netns, func() (err error) {
			pending, err = e.node.EnsureElders(cookie, pod.Fresh, time.Now().After(deadline))
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
	wires, _, err := wiresOf(e.host, pod)
	if err != nil {
		return false, err
	}
	var guarded, rules bool
	err = netns.Do(e.host, func() error {
		guarded, err = e.node.Guarded(target, wires)
		return err
	})
	if !guarded || err != nil {
		return false, err
	}
	err = netns.Do(pod.Netns, func() error {
		plan := Plan(PodConfig{Mode: EBPF, IPs: pod.IPs})
		if !pod.Exclude.DNS {
			plan.Rules = append(plan.Rules, plan.DNS...)
		}
		rules, err = held(plan)
		return err
	})
	return rules, err
}

func (e *ebpf) refuse(uid string) error { return e.node.Refuse(uid) }

func (e *ebpf) admit(uid string) error { return e.node.Admit(uid) }

func (e *ebpf) refused() ([]string, error) { return e.node.Refused() }

func (e *ebpf) guard() error { return e.node.Unguarded() }

func (e *ebpf) unguarded(pod Pod) (interfaces []string, err error) {
	if e.node.Unguarded() != nil {
		return nil, nil
	}
	_, interfaces, err = wiresOf(e.host, pod)
	return interfaces, err
}

func (e *ebpf) attempts() (func() (bpf.Attempt, error), func() error, error) {
	return e.node.Attempts()
}

// release first lets the pod's queries go to its resolvers again.
func (e *ebpf) release(cookie uint64, ns *os.File) error {
	var err error
	if ns != nil {
		err = netns.Do(ns, func() error { return removeRules(Plan(PodConfig{Mode: EBPF}).DNS) })
	}
	return errors.Join(err, netns.Do(e.host, func() error { return e.node.RemovePod(cookie) }))
}

func (e *ebpf) remove(ns *os.File) error {
	return netns.Do(ns, func() error { return remove(Plan(PodConfig{Mode: EBPF})) })
}

func (e *ebpf) prune(keep func(cookie uint64) bool) error {
	return netns.Do(e.host, func() error { return e.node.Prune(keep) })
}

func (e *ebpf) pods() ([]bpf.Pod, error) { return e.node.Pods() }

func (e *ebpf) ensureProxy(pid int) error { return e.node.EnsureProxy(pid) }

func (e *ebpf) counters() (map[string]uint64, error) { return e.node.Counters() }

func (e *ebpf) stock(ctx context.Context) error { return e.node.Stock(ctx) }

func (e *ebpf) close() error { return e.node.Close() }
