// Package lab builds a small world on one machine to try the mesh in, without Kubernetes: a control network namespace
// with a switch and istiod-lite, nodes that hang on the switch, and pods on the nodes. What is tried are the real
// programs of bin/, wired as a cluster would wire them: istiod-lite and the agents read Kubernetes objects from a
// directory, and pods are joined by calling the CNI plugin by the CNI specification, as a container runtime does.
//
//	control ── switch ──┬── node1: cni-agent, ztunnel ──┬── pod
//	istiod-lite         │                               └── pod
//	                    └── node2: cni-agent, ztunnel ───── pod
//
// Nothing outside the world's own namespaces changes. Namespaces have no names and mounts are private, so they end
// with the process that made the world, however it ends; its children die with it. What can outlive a killed process is
// a directory below StateDir and empty cgroups: the next New, or Prune, removes them.
//
// A program that uses the package calls RunIfChild first thing in main (a test: in TestMain), because pods' programs
// are the same executable started again.
package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// Options say what world to make.
type Options struct {
	// Nodes is how many nodes there are; 0 means 2, at most 9.
	Nodes int
	// Bin is the directory of the mesh's programs, as hack/build.sh makes it.
	Bin string
	// Redirection is how the agents redirect: ebpf (if empty) or nftables.
	Redirection string
	// Keep leaves the logs and the configuration behind at Close.
	Keep bool
	// Log receives one line for each step taken, and may be nil.
	Log func(format string, args ...any)
}

// World is one control namespace with its nodes and pods.
type World struct {
	// Dir holds everything the world writes: logs, the configuration directory, keys.
	Dir   string
	Nodes []*Node
	// Wire counts what pods say to one another between node1 and the other nodes.
	Wire *Capture

	opts    Options
	name    string
	lock    *os.File
	control *thread
	cgroup  string
	istiod  *process
	closed  bool

	mu       sync.Mutex
	pods     []*Pod
	services []*Service
	objects  objects
}

// New makes a world of nodes without a mesh: pods on it talk to one another plainly until StartMesh.
func New(opts Options) (*World, error) {
	if opts.Nodes == 0 {
		opts.Nodes = 2
	}
	if opts.Redirection == "" {
		opts.Redirection = "ebpf"
	}
	if opts.Log == nil {
		opts.Log = func(string, ...any) {}
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("a lab needs root: it makes network namespaces and cgroups")
	}
	if err := Prune(); err != nil {
		return nil, fmt.Errorf("remove what an earlier run left: %w", err)
	}
	bin, err := filepath.Abs(opts.Bin)
	if err != nil {
		return nil, err
	}
	opts.Bin = bin
	w := &World{opts: opts}
	if err := w.build(); err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return w, nil
}

func (w *World) build() error {
	var err error
	if w.Dir, w.lock, err = claim(); err != nil {
		return err
	}
	w.name = filepath.Base(w.Dir)
	w.objects.dir = filepath.Join(w.Dir, "config")
	for _, dir := range []string{"config", "ca", "log"} {
		if err := os.Mkdir(filepath.Join(w.Dir, dir), 0o755); err != nil {
			return err
		}
	}
	if w.cgroup, err = makeCgroup(w.name); err != nil {
		return err
	}
	if w.control, err = newThread(enterControl); err != nil {
		return fmt.Errorf("make the control namespace: %w", err)
	}
	for i := range w.opts.Nodes {
		n, err := w.newNode(i)
		if err != nil {
			return fmt.Errorf("make node%d: %w", i+1, err)
		}
		w.Nodes = append(w.Nodes, n)
	}
	w.Wire, err = w.control.capture("node1", controlAddresses())
	if err != nil {
		return fmt.Errorf("capture on node1's link: %w", err)
	}
	return nil
}

// Close takes the world away: pods by CNI DEL, then the programs, then the namespaces, cgroups and files. A second call
// does nothing.
func (w *World) Close() error {
	if w.closed {
		return nil
	}
	w.closed = true
	var errs []error
	for _, p := range w.Pods() {
		errs = append(errs, w.RemovePod(context.Background(), p))
	}
	errs = append(errs, w.stopMesh())
	if w.Wire != nil {
		w.Wire.close()
	}
	for _, n := range w.Nodes {
		n.thread.end()
	}
	if w.control != nil {
		w.control.end()
	}
	if w.cgroup != "" {
		errs = append(errs, removeCgroup(w.cgroup))
	}
	if w.lock != nil {
		errs = append(errs, release(w.Dir, w.lock, w.opts.Keep))
	}
	return errors.Join(errs...)
}

// Keep leaves the world's directory behind at Close, with the logs; the next world removes it.
func (w *World) Keep() { w.opts.Keep = true }

// Pods returns the pods there are now.
func (w *World) Pods() []*Pod {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]*Pod(nil), w.pods...)
}

// step logs the time that a step took, or how it failed.
func (w *World) step(what string, f func() error) error {
	start := time.Now()
	if err := f(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	w.opts.Log("%s (%d ms)", what, time.Since(start).Milliseconds())
	return nil
}

// The addresses of a world. Every world has the same ones: they exist in its own namespaces only.
func controlAddresses() []netip.Addr {
	return []netip.Addr{netip.MustParseAddr("10.99.0.1"), netip.MustParseAddr("fd00:99::1")}
}

func nodeAddresses(index int) []netip.Addr {
	return []netip.Addr{
		netip.AddrFrom4([4]byte{10, 99, 0, byte(11 + index)}),
		netip.MustParseAddr(fmt.Sprintf("fd00:99::%d", 11+index)),
	}
}

// podPrefixes are the pod addresses of a node, one prefix for each family.
func podPrefixes(index int) []netip.Prefix {
	return []netip.Prefix{
		netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(index + 1), 0}), 24),
		netip.MustParsePrefix(fmt.Sprintf("fd00:244:%d::/64", index+1)),
	}
}

// hostOf returns the n-th address of a prefix.
func hostOf(p netip.Prefix, n int) netip.Addr {
	a := p.Addr()
	for range n {
		a = a.Next()
	}
	return a
}
