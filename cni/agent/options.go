package agent

import (
	"context"
	"errors"
	"reflect"

	corev1 "k8s.io/api/core/v1"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// exclusions are what a pod's and its namespace's annotations leave out of redirection. The error names those that cannot
// be understood, which leave nothing out. namespace is nil when it is not known.
func (w *watcher) exclusions(pod *corev1.Pod, namespace *corev1.Namespace) (mesh.Exclusions, error) {
	var inherited map[string]string
	if namespace != nil {
		inherited = namespace.Annotations
	}
	exclude, errs := mesh.ParseExclusions(pod.Annotations, inherited, w.captureDNS)
	return exclude, errors.Join(errs...)
}

// complain attaches an event to a pod whose annotations cannot be understood, once for each different reason. A nil reason
// takes the complaint back.
func (w *watcher) complain(ctx context.Context, pod *corev1.Pod, reason error) error {
	uid := string(pod.UID)
	if reason == nil {
		w.forgetComplaint(uid)
		return nil
	}
	w.mu.Lock()
	again := w.complaints[uid] == reason.Error()
	w.complaints[uid] = reason.Error()
	w.mu.Unlock()
	if again {
		return nil
	}
	return w.cluster.warn(ctx, pod, "InvalidExclusion", "the pod is captured without what this asks to leave out: "+reason.Error())
}

func (w *watcher) forgetComplaint(uid string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.complaints, uid)
}

// sameExclusions tells whether nothing has to be done to make one the other.
func sameExclusions(a, b mesh.Exclusions) bool { return reflect.DeepEqual(a, b) }
