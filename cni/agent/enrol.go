package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-mesh/fairlead/cni/redirect"
	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/internal/zds"
)

// enroller takes pods into the mesh and out of it. Its methods are safe for concurrent use; what is done to one pod is
// done in turn.
type enroller struct {
	log        *zap.Logger
	redirector *redirect.Redirector
	proxies    *zds.Server
	records    *records
	finder     finder
	metrics    *metrics
	// steps is Config.Steps.
	steps func(step string)
	// ackTimeout bounds the wait for the proxy.
	ackTimeout time.Duration
	// starting has a place for each pod that is redirected at its start at the same time: more than there are processors would
	// only wait for each other half-way.
	starting chan struct{}
	// used and looked wake trim.
	used, looked chan struct{}
	// unguarded is done once it is told that there is no guard.
	unguarded sync.Once

	mu    sync.Mutex
	turns map[string]*turn
	acked map[string]bool // pods that the proxy has accepted since this agent started
}

// turn is a lock for one pod, kept while someone holds or awaits it.
type turn struct {
	sync.Mutex
	users int
}

// at tells a test which step is reached.
func (e *enroller) at(step string) {
	if e.steps != nil {
		e.steps(step)
	}
}

// take waits for the pod's turn; the returned function ends it.
func (e *enroller) take(uid string) func() {
	e.mu.Lock()
	t := e.turns[uid]
	if t == nil {
		t = &turn{}
		e.turns[uid] = t
	}
	t.users++
	e.mu.Unlock()
	t.Lock()
	return func() {
		t.Unlock()
		e.mu.Lock()
		defer e.mu.Unlock()
		if t.users--; t.users == 0 {
			delete(e.turns, uid)
		}
	}
}

// start captures a pod whose sandbox was just made, before any of its containers runs: the redirection first, so that
// there is no moment without. When the proxy does not accept the pod, everything is taken back and the start fails.
func (e *enroller) start(ctx context.Context, rec record, ns *os.File) error {
	asked := time.Now()
	defer e.take(rec.UID)()
	defer e.use()
	e.at("start: asked")
	if err := ctx.Err(); err != nil { // since the runtime gave up, the pod may have been given a newer sandbox
		return fmt.Errorf("wait for the pod's turn: %w", err)
	}
	if err := e.leaveOldSandbox(rec); err != nil {
		return err
	}
	select {
	case e.starting <- struct{}{}:
	case <-ctx.Done(): // the runtime no longer waits: its next request must not wait for this one
		return fmt.Errorf("wait for the starts of other pods: %w", ctx.Err())
	}
	waited := time.Since(asked)
	err := e.redirect(ctx, &rec, ns, true)
	<-e.starting
	if err != nil {
		return errors.Join(err, e.withdraw(ctx, rec))
	}
	redirected := time.Since(asked)
	e.metrics.redirected.Observe(redirected.Seconds())
	e.at("start: redirected")
	if err := e.announce(ctx, rec, ns); err != nil {
		return errors.Join(err, e.withdraw(ctx, rec))
	}
	e.at("start: accepted")
	e.log.Info("pod starts in the mesh", zap.String("pod", rec.pod()), zap.String("uid", rec.UID),
		zap.Uint64("netns", rec.Cookie), zap.Duration("waited", waited), zap.Duration("redirected", redirected), zap.Duration("took", time.Since(asked)))
	return nil
}

// remember records a sandbox that is not captured, for the day it is to be.
func (e *enroller) remember(rec record) error {
	defer e.take(rec.UID)()
	if err := e.leaveOldSandbox(rec); err != nil {
		return err
	}
	return e.records.put(rec)
}

// leaveOldSandbox forgets the pod's former network namespace, if it has a new one.
func (e *enroller) leaveOldSandbox(rec record) error {
	old, ok := e.records.get(rec.UID)
	if !ok || old.Cookie == rec.Cookie || !old.Redirected {
		return nil
	}
	return e.unredirect(old)
}

// capture takes a pod that runs already into the mesh, or makes sure that it still is. The proxy is told first, so that
// connections made meanwhile are not refused; but the redirection does not wait for it for ever. With late set, when the
// pod should have been captured at its start, it does not wait at all.
func (e *enroller) capture(ctx context.Context, rec record, late bool, uids ...string) error {
	defer e.take(rec.UID)()
	if known, ok := e.records.get(rec.UID); ok {
		// What the sandbox is, its start told better.
		rec.Netns, rec.Cookie, rec.ContainerID, rec.Redirected = known.Netns, known.Cookie, known.ContainerID, known.Redirected
		if len(known.IPs) > 0 {
			rec.IPs = known.IPs
		}
	}
	ns, path, err := e.finder.open(rec, uids...)
	if err != nil {
		return err
	}
	defer ns.Close()
	rec.Netns = path
	cookie, err := netns.Cookie(ns)
	if err != nil {
		return err
	}
	if rec.Redirected && cookie != rec.Cookie {
		// Another sandbox than the one that was captured.
		if err := e.redirector.Release(rec.Cookie, nil); err != nil {
			return err
		}
		rec.Redirected = false
	}
	rec.Cookie = cookie
	e.at("capture: found")
	var announced error
	if !rec.Redirected && !late {
		if _, err := e.redirector.Prepare(ctx, rec.target(ns)); err != nil {
			return err
		}
		e.at("capture: prepared")
		announced = e.announce(ctx, rec, ns)
		e.at("capture: announced")
	}
	was := rec.Redirected
	if err := e.redirect(ctx, &rec, ns, false); err != nil {
		return err
	}
	e.at("capture: redirected")
	if err := e.redirector.Admit(rec.UID); err != nil {
		return err
	}
	if !was {
		e.log.Info("pod enrolled", zap.String("pod", rec.pod()), zap.String("uid", rec.UID), zap.Uint64("netns", rec.Cookie))
	}
	if announced == nil && !e.isAcked(rec.UID) {
		announced = e.announce(ctx, rec, ns)
	}
	return announced
}

// redirect records the pod, whose cookie is that of ns, as redirected and then redirects it, so that a crash in between
// leaves more, not less, in the record than in the kernel. With fresh set, nothing has run in the pod yet.
func (e *enroller) redirect(ctx context.Context, rec *record, ns *os.File, fresh bool) error {
	rec.Redirected, rec.Routed = true, true
	if err := e.records.put(*rec); err != nil {
		return err
	}
	if fresh {
		e.at("start: recorded")
	} else {
		e.at("capture: recorded")
	}
	target := rec.target(ns)
	target.Fresh = fresh
	if _, err := e.redirector.Ensure(ctx, target); err != nil {
		return err
	}
	if err := e.redirector.Guard(); err != nil {
		e.tellUnguarded(err)
	}
	return nil
}

// unredirect ends the redirection of a pod, whose network namespace may be gone.
func (e *enroller) unredirect(rec record) error {
	ns, _, err := e.finder.open(rec)
	if err != nil && !errors.Is(err, errNoNetns) {
		return err
	}
	if err == nil {
		defer ns.Close()
		if cookie, err := netns.Cookie(ns); err != nil || cookie != rec.Cookie {
			ns = nil // another sandbox of the pod
		}
	}
	return e.redirector.Release(rec.Cookie, ns)
}

// announce tells the proxy of the pod and waits until it has accepted it.
func (e *enroller) announce(ctx context.Context, rec record, ns *os.File) error {
	ctx, cancel := context.WithTimeout(ctx, e.ackTimeout)
	defer cancel()
	if err := e.proxies.Add(ctx, rec.workload(ns)); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.acked[rec.UID] = true
	return nil
}

func (e *enroller) isAcked(uid string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.acked[uid]
}

// captured tells whether this agent has taken a pod into the mesh, which had the addresses that it has now; a pod without any
// is on its way to them.
func (e *enroller) captured(rec record, ips []netip.Addr) bool {
	return rec.Redirected && e.isAcked(rec.UID) && !slices.ContainsFunc(ips, func(ip netip.Addr) bool { return !slices.Contains(rec.IPs, ip) })
}

// holds tells whether a pod is in the mesh, as the records say, the proxy has said, and the kernel has it.
func (e *enroller) holds(rec record, uids ...string) bool {
	if !rec.Redirected || !e.isAcked(rec.UID) {
		return false
	}
	ns, _, err := e.finder.open(rec, uids...)
	if err != nil {
		return false
	}
	defer ns.Close()
	held, err := e.redirector.Holds(rec.target(ns))
	return err == nil && held
}

// release takes a running pod out of the mesh: first no new connection is redirected, then the proxy is told. The
// pod's routes stay for the connections that are open.
func (e *enroller) release(ctx context.Context, uid string) error {
	defer e.take(uid)()
	if err := e.redirector.Admit(uid); err != nil {
		return err
	}
	rec, ok := e.records.get(uid)
	if !ok || !rec.Redirected {
		return nil
	}
	if err := e.withdraw(ctx, rec); err != nil {
		return err
	}
	e.log.Info("pod unenrolled", zap.String("pod", rec.pod()), zap.String("uid", uid))
	return nil
}

// withdraw undoes redirect and announce.
func (e *enroller) withdraw(ctx context.Context, rec record) error {
	if err := e.unredirect(rec); err != nil {
		return err
	}
	e.at("withdraw: released")
	if err := e.unannounce(ctx, rec.UID); err != nil {
		return err
	}
	e.at("withdraw: unannounced")
	rec.Redirected = false
	return e.records.put(rec)
}

// forget drops all that is known of a pod that is gone. containerID restricts it to that sandbox; empty means any.
func (e *enroller) forget(ctx context.Context, uid, containerID string) error {
	defer e.take(uid)()
	if err := e.redirector.Admit(uid); err != nil {
		return err
	}
	rec, ok := e.records.get(uid)
	if !ok || containerID != "" && rec.ContainerID != "" && rec.ContainerID != containerID {
		return nil
	}
	if rec.Redirected {
		if err := e.unredirect(rec); err != nil {
			return err
		}
	}
	e.at("forget: released")
	if err := e.unannounce(ctx, uid); err != nil {
		return err
	}
	e.at("forget: unannounced")
	return e.records.remove(uid)
}

// unannounce tells the proxy that the pod is gone. A proxy that does not answer does not hold anything up: it learns
// what is left when it connects again.
func (e *enroller) unannounce(ctx context.Context, uid string) error {
	e.mu.Lock()
	delete(e.acked, uid)
	e.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), e.ackTimeout)
	defer cancel()
	if err := e.proxies.Delete(ctx, uid); err != nil && ctx.Err() == nil {
		return err
	}
	return nil
}

// recover puts the pods that are captured according to the records, or else to the kernel, into the set that proxies
// are told of, without waiting for any. So a proxy that connects keeps them, whether or not the API server answers.
func (e *enroller) recover() error {
	kernel, err := e.redirector.Pods()
	if err != nil {
		return err
	}
	for _, pod := range kernel {
		if rec, ok := e.records.get(pod.UID); ok && rec.Redirected || !validUID.MatchString(pod.UID) {
			continue
		}
		rec := record{UID: pod.UID, Cookie: pod.Cookie, IPs: pod.IPs, Redirected: true, Routed: true}
		if err := e.records.put(rec); err != nil {
			return err
		}
	}
	for _, rec := range e.records.all() {
		if !rec.Redirected {
			continue
		}
		ns, _, err := e.finder.open(rec)
		if err != nil || rec.Name == "" {
			e.proxies.Keep(rec.UID)
		} else {
			e.register(rec, ns)
		}
		if err == nil {
			ns.Close()
		}
	}
	return nil
}

// register puts a pod in the set that proxies are told of, without waiting for any.
func (e *enroller) register(rec record, ns *os.File) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := e.proxies.Add(ctx, rec.workload(ns)); err != nil && !errors.Is(err, context.Canceled) {
		e.log.Warn("pod not handed to the proxy", zap.String("pod", rec.pod()), zap.Error(err))
	}
}

// prune removes from the kernel what belongs to no pod that exists. exists tells whether a UID is a pod's.
func (e *enroller) prune(exists func(uid string) bool) error {
	keep := map[uint64]bool{}
	for _, rec := range e.records.all() {
		keep[rec.Cookie] = rec.Redirected
	}
	kernel, err := e.redirector.Pods()
	if err != nil {
		return err
	}
	for _, pod := range kernel {
		if exists(pod.UID) {
			keep[pod.Cookie] = true
		}
	}
	refused, err := e.redirector.Refused()
	if err != nil {
		return err
	}
	for _, uid := range refused {
		if !exists(uid) {
			if err := e.redirector.Admit(uid); err != nil {
				return err
			}
		}
	}
	return e.redirector.Prune(func(cookie uint64) bool { return keep[cookie] })
}

// removeAll takes every pod out of the mesh and removes all traces from their network namespaces.
func (e *enroller) removeAll() error {
	var errs []error
	for _, rec := range e.records.all() {
		if !rec.Routed {
			continue
		}
		ns, _, err := e.finder.open(rec)
		if errors.Is(err, errNoNetns) {
			continue
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("clean pod %s: %w", rec.pod(), err))
			continue
		}
		errs = append(errs, e.redirector.Remove(ns), ns.Close())
	}
	return errors.Join(errs...)
}

func (r record) target(ns *os.File) redirect.Pod {
	return redirect.Pod{UID: r.UID, Netns: ns, IPs: r.IPs, Exclude: r.Exclude}
}

func (r record) workload(ns *os.File) zds.Workload {
	return zds.Workload{UID: r.UID, Name: r.Name, Namespace: r.Namespace, ServiceAccount: r.ServiceAccount, Netns: ns}
}

// parseIPs reads addresses and leaves out what is none.
func parseIPs(texts []string) []netip.Addr {
	var ips []netip.Addr
	for _, text := range texts {
		if ip, err := netip.ParseAddr(text); err == nil {
			ips = append(ips, ip.Unmap())
		}
	}
	return ips
}
