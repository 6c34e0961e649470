package redirect

// A pod's TCP reaches the node proxy in these steps:
//
//  1. New chooses how the node redirects (mode.go): by eBPF (ebpf.go), or by nftables (nft.go) where the kernel cannot.
//  2. Plan (plan.go) decides the rules of the pod's network namespace: sysctls, ip rules, routes; chains (chains.go).
//  3. Prepare makes them true (apply.go) and gives the proxy a place for its listeners.
//  4. Ensure attaches the pod's programs. From then on bpf/connect.c marks what the application connects, the rules bring
//     marked packets to lo, and bpf/lookup.c hands them, and what arrives from outside, to the proxy's listeners. Last come
//     the rules for DNS, which need no mark.
//     With nftables it makes the chains (ruleset.go), which give connections to the proxy's ports.
//  5. What the pod's exclusions (exclusion.go) name is left alone.
//
// Next: bpf/connect.c

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"os"
	"slices"

	"github.com/fairlead-mesh/fairlead/bpf"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// Config says where redirection finds the node.
type Config struct {
	// Mode is how to redirect; empty means Auto.
	Mode Mode
	// BPFFS is the directory for pins; see bpf.Config.
	BPFFS string
	// HostMounts is a file of the mount namespace in which BPFFS is mounted if it is on no BPF file system; empty means this
	// process's.
	HostMounts string
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
	// Fresh tells that nothing has run in the pod yet, so that there are no connections to spare.
	Fresh bool
	// Exclude is what is left out of redirection.
	Exclude mesh.Exclusions
}

// backend is one way to redirect. Its methods are those of Redirector, which has looked up the cookie of the pod's network
// namespace and refused the host's. ensure does what prepare does too.
type backend interface {
	prepare(pod Pod, cookie uint64) error
	ensure(pod Pod, cookie uint64) error
	holds(pod Pod, cookie uint64) (bool, error)
	release(cookie uint64, ns *os.File) error
	remove(ns *os.File) error
	prune(keep func(cookie uint64) bool) error
	pods() ([]bpf.Pod, error)
	ensureProxy(pid int) error
	counters() (map[string]uint64, error)
	refuse(uid string) error
	admit(uid string) error
	refused() (uids []string, err error)
	guard() error
	unguarded(pod Pod) (interfaces []string, err error)
	attempts() (next func() (bpf.Attempt, error), stop func() error, err error)
	stock(ctx context.Context) error
	close() error
}

// Redirector redirects the pods of one node. What it sets up stays when the process ends. Its methods are safe for
// concurrent use.
type Redirector struct {
	mode    Mode
	why     error
	backend backend
	// former is of the other mode, which an earlier process used; nil if none did since the node was booted.
	former backend
	host   uint64 // cookie of the host's network namespace
}

// New makes the node ready. The error says what the machine lacks.
func New(cfg Config) (*Redirector, error) {
	host, err := netns.Cookie(cfg.HostNetns)
	if err != nil {
		return nil, fmt.Errorf("identify the host's network namespace: %w", err)
	}
	r := &Redirector{host: host}
	r.mode, r.why = choose(cfg)
	other, left := EBPF, bpf.Present(cfg.BPFFS)
	if r.mode == EBPF {
		other = NFTables
		left, err = nftPresent(cfg)
	}
	if err == nil && left {
		r.former, err = newBackend(other, cfg, host)
	}
	if err == nil {
		r.backend, err = newBackend(r.mode, cfg, host)
	}
	if err != nil {
		return nil, errors.Join(err, r.why, r.Close())
	}
	return r, nil
}

func newBackend(mode Mode, cfg Config, host uint64) (backend, error) {
	if mode == EBPF {
		return newEBPF(cfg, host)
	}
	return newNFT(cfg)
}

// Mode tells how the node redirects, and if that is by nftables for want of something, what eBPF lacks.
func (r *Redirector) Mode() (mode Mode, why error) { return r.mode, r.why }

// Prepare does what can be done for a pod without touching its traffic, so that the proxy can put its listeners in
// place before Ensure. It returns the pod's cookie.
func (r *Redirector) Prepare(ctx context.Context, pod Pod) (uint64, error) {
	cookie, err := r.identify(ctx, pod)
	if err != nil {
		return 0, err
	}
	return cookie, r.backend.prepare(pod, cookie)
}

// identify returns the cookie of the pod's network namespace, which must not be the host's.
func (r *Redirector) identify(ctx context.Context, pod Pod) (uint64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	cookie, err := netns.Cookie(pod.Netns)
	if err == nil && cookie == r.host {
		err = errors.New("redirect a pod: it runs in the host's network namespace")
	}
	return cookie, err
}

// Ensure redirects a pod. From its return on, no new TCP connection of the pod, in or out, avoids the proxy; while the
// proxy does not listen they are refused. Connections that exist go on as they are.
func (r *Redirector) Ensure(ctx context.Context, pod Pod) (uint64, error) {
	cookie, err := r.identify(ctx, pod)
	if err != nil {
		return 0, err
	}
	if err := r.backend.ensure(pod, cookie); err != nil {
		return 0, fmt.Errorf("redirect the pod: %w", err)
	}
	if r.former != nil {
		if err := r.former.release(cookie, pod.Netns); err != nil {
			return 0, fmt.Errorf("end the pod's former redirection: %w", err)
		}
	}
	return cookie, nil
}

// Holds tells whether the kernel still holds everything that Ensure made for the pod.
func (r *Redirector) Holds(pod Pod) (bool, error) {
	cookie, err := netns.Cookie(pod.Netns)
	if err != nil {
		return false, err
	}
	return r.backend.holds(pod, cookie)
}

// Release ends the redirection of new connections of the pod with that cookie, whose network namespace is ns, or nil if
// that is gone. Redirected connections go on, for which the pod's routes stay; they do nothing to packets without the
// mark.
func (r *Redirector) Release(cookie uint64, ns *os.File) error {
	for b := range r.backends() {
		if err := b.release(cookie, ns); err != nil {
			return fmt.Errorf("stop redirecting the pod: %w", err)
		}
	}
	return nil
}

// Remove takes everything away from a pod's network namespace, which ends redirected connections.
func (r *Redirector) Remove(ns *os.File) error {
	cookie, err := netns.Cookie(ns)
	if err != nil {
		return err
	}
	if err := r.Release(cookie, ns); err != nil {
		return err
	}
	for b := range r.backends() {
		if err := b.remove(ns); err != nil {
			return fmt.Errorf("clean the pod's network namespace: %w", err)
		}
	}
	return nil
}

// Prune stops redirecting pods whose cookie keep says no to, as those whose network namespace is gone.
func (r *Redirector) Prune(keep func(cookie uint64) bool) error {
	for b := range r.backends() {
		if err := b.prune(keep); err != nil {
			return fmt.Errorf("forget pods that are gone: %w", err)
		}
	}
	return nil
}

// Pods lists the pods that the kernel redirects, also those set up by an earlier process.
func (r *Redirector) Pods() ([]bpf.Pod, error) {
	var all []bpf.Pod
	for b := range r.backends() {
		some, err := b.pods()
		if err != nil {
			return nil, err
		}
		all = append(all, slices.DeleteFunc(some, func(p bpf.Pod) bool {
			return slices.ContainsFunc(all, func(other bpf.Pod) bool { return other.Cookie == p.Cookie })
		})...)
	}
	return all, nil
}

// EnsureProxy exempts the node proxy, known by the id of its process, from redirection; see bpf.Node.EnsureProxy.
func (r *Redirector) EnsureProxy(pid int) error { return r.backend.ensureProxy(pid) }

// Counters returns what the kernel has counted, by name.
func (r *Redirector) Counters() (map[string]uint64, error) { return r.backend.counters() }

// Refuse drops all TCP of a pod that cannot be redirected, until Admit.
func (r *Redirector) Refuse(uid string) error {
	if err := r.backend.refuse(uid); err != nil {
		return fmt.Errorf("refuse the pod's traffic: %w", err)
	}
	return nil
}

// Admit ends Refuse. It is no error when there was none.
func (r *Redirector) Admit(uid string) error {
	for b := range r.backends() {
		if err := b.admit(uid); err != nil {
			return fmt.Errorf("admit the pod's traffic: %w", err)
		}
	}
	return nil
}

// Refused lists the UIDs of pods whose traffic is refused.
func (r *Redirector) Refused() ([]string, error) { return r.backend.refused() }

// Guard tells why packets that leave pods cannot be checked on this machine, or nil: without the guard, a pod that has the
// capabilities for raw sockets or for changing its network namespace could avoid the proxy.
func (r *Redirector) Guard() error { return r.backend.guard() }

// Unguarded names the pod's interfaces without a guard, because they have no other end on the host where it could be.
func (r *Redirector) Unguarded(pod Pod) (interfaces []string, err error) {
	return r.backend.unguarded(pod)
}

// Attempts tells of TCP that went round the proxy and was dropped, at most once a second for each pod. next waits, until
// stop is called. The error says why this machine cannot tell.
func (r *Redirector) Attempts() (next func() (bpf.Attempt, error), stop func() error, err error) {
	return r.backend.attempts()
}

// Stock keeps ready what pods' starts need, so that they do not wait for it, until ctx ends.
func (r *Redirector) Stock(ctx context.Context) error { return r.backend.stock(ctx) }

// Close releases this process's handles and leaves redirection in force.
func (r *Redirector) Close() error {
	var errs []error
	for b := range r.backends() {
		errs = append(errs, b.close())
	}
	return errors.Join(errs...)
}

// backends are the one in use, and what is left of the other.
func (r *Redirector) backends() iter.Seq[backend] {
	return func(yield func(backend) bool) {
		for _, b := range []backend{r.backend, r.former} {
			if b != nil && !yield(b) {
				return
			}
		}
	}
}

// Uninstall removes the node's part: programs, pins, probe sources and tables. Pods are to be removed before.
func Uninstall(cfg Config) error {
	return within(cfg.HostNetns, func(s space) error {
		return errors.Join(bpf.Remove(cfg.BPFFS, cfg.HostMounts, filters{s.Handle}), removeHost(), removeTable())
	})
}
