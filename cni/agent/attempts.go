package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"

	"github.com/fairlead-mesh/fairlead/bpf"
)

// A pod that tries to avoid the node proxy is told of, in these steps:
//
//  1. bpf/guard.c has dropped the packet, counted it, and told of it, at most once a second for each pod.
//  2. The pod is looked at again at once: rules that it changed are repaired.
//  3. The pod gets an event, unless it had one lately.
//
// Next: cni/agent/watch.go

// attemptQuiet is how long a pod gets no further event after one about an attempt.
const attemptQuiet = 5 * time.Minute

// followAttempts tells of attempts until ctx ends. On a node that cannot check what leaves pods, it says so.
func (a *agent) followAttempts(ctx context.Context) error {
	next, stop, err := a.enrol.redirector.Attempts()
	if err != nil {
		a.enrol.tellUnguarded(err)
		return nil
	}
	context.AfterFunc(ctx, func() { stop() })
	told := map[string]time.Time{}
	for {
		attempt, err := next()
		if errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("follow attempts to avoid the proxy: %w", err)
		}
		rec, ok := a.enrol.records.byCookie(attempt.Cookie)
		if !ok {
			continue
		}
		a.log.Warn("a pod's TCP went round the node proxy and was dropped", zap.String("pod", rec.pod()), zap.Stringer("to", attempt.To))
		a.watch.doubt(rec.pod())
		if time.Since(told[rec.UID]) > attemptQuiet {
			told[rec.UID] = time.Now()
			a.watch.tellAttempt(ctx, rec, attempt)
		}
	}
}

// tellUnguarded says, once, that this node cannot check what leaves pods.
func (e *enroller) tellUnguarded(reason error) {
	e.unguarded.Do(func() {
		e.log.Warn("pods with CAP_NET_RAW or CAP_NET_ADMIN could avoid the node proxy: not all that leaves pods is checked on this node",
			zap.Error(reason))
	})
}

// tellAttempt attaches an event to the pod.
func (w *watcher) tellAttempt(ctx context.Context, rec record, attempt bpf.Attempt) {
	object, ok, err := w.pods.GetByKey(rec.pod())
	if err != nil || !ok {
		return
	}
	message := fmt.Sprintf("TCP to %v was sent past the mesh's proxy and dropped: a process of the pod uses raw sockets, "+
		"or has changed the pod's network", attempt.To)
	if err := w.cluster.warn(ctx, object.(*corev1.Pod), "MeshBypassAttempt", message); err != nil && ctx.Err() == nil {
		w.log.Warn("no event about an attempt to avoid the proxy", zap.String("pod", rec.pod()), zap.Error(err))
	}
}
