package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

const (
	// workers is how many pods are looked at at once.
	workers = 4
	// auditEvery is how often each pod of the mesh is compared with what the kernel holds.
	auditEvery = 30 * time.Second
)

// work is one thing to do: look at the pod called key again, or, when gone is set, forget the pod with that UID. The queue gives
// equal work to one worker at a time, so that nothing else may be in it.
type work struct {
	key, gone string
}

// watcher follows the pods of the node and all namespaces, and keeps the mesh as their labels want it.
type watcher struct {
	log     *zap.Logger
	cluster cluster
	enrol   *enroller
	exclude []string
	// node is the name of the node whose pods are ours.
	node string
	// began is when the agent started: pods made later should have been captured at their start.
	began time.Time
	// captureDNS is Config.CaptureDNS.
	captureDNS bool

	queue      workqueue.TypedRateLimitingInterface[work]
	pods       cache.Store
	namespaces cache.Store
	informers  []cache.Controller

	mu sync.Mutex
	// doubted are the keys of queued pods of which the kernel is to be asked whether it still holds what this agent has made. It
	// is not when only the object is new: a start changes its pod four times, and that would take longer than to capture it.
	doubted    map[string]bool
	warned     map[string]string // the last warning on each pod, by UID
	complaints map[string]string // the last complaint of each pod's annotations, by UID
}

func newWatcher(log *zap.Logger, c cluster, e *enroller, cfg Config) *watcher {
	w := &watcher{
		log: log, cluster: c, enrol: e, node: cfg.NodeName, exclude: cfg.ExcludeNamespaces, captureDNS: cfg.CaptureDNS,
		began: time.Now(), doubted: map[string]bool{}, warned: map[string]string{}, complaints: map[string]string{},
	}
	w.queue = workqueue.NewTypedRateLimitingQueue(
		workqueue.NewTypedItemExponentialFailureRateLimiter[work](200*time.Millisecond, 30*time.Second))
	var pods, namespaces cache.Controller
	w.pods, pods = cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: c.podLists(), ObjectType: &corev1.Pod{}, Transform: trim, Handler: cache.ResourceEventHandlerFuncs{
			AddFunc:    func(o any) { w.look(o.(*corev1.Pod)) },
			UpdateFunc: func(before, after any) { w.replaced(before.(*corev1.Pod), after.(*corev1.Pod)) },
			DeleteFunc: w.deleted,
		},
	})
	w.namespaces, namespaces = cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: c.namespaceLists(), ObjectType: &corev1.Namespace{}, Transform: trim, Handler: cache.ResourceEventHandlerFuncs{
			AddFunc:    func(o any) { w.lookAtAll(o.(*corev1.Namespace).Name) },
			UpdateFunc: func(_, after any) { w.lookAtAll(after.(*corev1.Namespace).Name) },
			DeleteFunc: func(any) {},
		},
	})
	w.informers = []cache.Controller{pods, namespaces}
	return w
}

// trim keeps of an object what decisions need.
func trim(object any) (any, error) {
	switch o := object.(type) {
	case *corev1.Pod:
		return &corev1.Pod{
			ObjectMeta: trimMeta(o.ObjectMeta),
			Spec:       corev1.PodSpec{NodeName: o.Spec.NodeName, HostNetwork: o.Spec.HostNetwork, ServiceAccountName: o.Spec.ServiceAccountName},
			Status:     trimStatus(o),
		}, nil
	case *corev1.Namespace:
		return &corev1.Namespace{ObjectMeta: trimMeta(o.ObjectMeta)}, nil
	}
	return object, nil
}

func trimStatus(pod *corev1.Pod) corev1.PodStatus {
	kept := corev1.PodStatus{Phase: pod.Status.Phase, PodIP: pod.Status.PodIP, PodIPs: pod.Status.PodIPs}
	if c := capturedCondition(pod); c != nil {
		kept.Conditions = []corev1.PodCondition{{Type: c.Type, Status: c.Status}}
	}
	return kept
}

func trimMeta(m metav1.ObjectMeta) metav1.ObjectMeta {
	kept := metav1.ObjectMeta{
		Name: m.Name, Namespace: m.Namespace, UID: m.UID, ResourceVersion: m.ResourceVersion, DeletionTimestamp: m.DeletionTimestamp, CreationTimestamp: m.CreationTimestamp,
		Labels: map[string]string{}, Annotations: map[string]string{},
	}
	if v, ok := m.Labels[modeLabel]; ok {
		kept.Labels[modeLabel] = v
	}
	for _, name := range append(mesh.ExclusionAnnotations(), sidecarAnnotation, redirectionAnnotation, mirrorAnnotation) {
		if v, ok := m.Annotations[name]; ok {
			kept.Annotations[name] = v
		}
	}
	return kept
}

func (w *watcher) look(pod *corev1.Pod) {
	if pod.Spec.NodeName == w.node {
		w.doubt(pod.Namespace + "/" + pod.Name)
	}
}

// doubt looks at a pod, and at what the kernel has of it.
func (w *watcher) doubt(key string) {
	w.setDoubt(key)
	w.queue.Add(work{key: key})
}

func (w *watcher) setDoubt(key string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.doubted[key] = true
}

// doubts takes what setDoubt has set.
func (w *watcher) doubts(key string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	doubted := w.doubted[key]
	delete(w.doubted, key)
	return doubted
}

func (w *watcher) replaced(before, after *corev1.Pod) {
	if before.UID != after.UID {
		w.queue.Add(work{gone: string(before.UID)})
	}
	if after.Spec.NodeName == w.node {
		w.queue.Add(work{key: after.Namespace + "/" + after.Name})
	}
}

func (w *watcher) deleted(object any) {
	if tombstone, ok := object.(cache.DeletedFinalStateUnknown); ok {
		object = tombstone.Obj
	}
	if pod, ok := object.(*corev1.Pod); ok {
		w.queue.Add(work{gone: string(pod.UID)})
	}
}

// lookAtAll looks at the pods of a namespace, or of all when it is empty.
func (w *watcher) lookAtAll(namespace string) {
	for _, object := range w.pods.List() {
		if pod := object.(*corev1.Pod); namespace == "" || pod.Namespace == namespace {
			w.look(pod)
		}
	}
}

// follow starts the informers and returns when they know everything.
func (w *watcher) follow(ctx context.Context) error {
	for _, informer := range w.informers {
		go informer.RunWithContext(ctx)
	}
	if !cache.WaitForCacheSync(ctx.Done(), w.informers[0].HasSynced, w.informers[1].HasSynced) {
		return ctx.Err()
	}
	return nil
}

// run works through the queue until ctx ends.
func (w *watcher) run(ctx context.Context) {
	context.AfterFunc(ctx, w.queue.ShutDown)
	var group sync.WaitGroup
	for range workers {
		group.Go(func() {
			for w.next(ctx) {
			}
		})
	}
	group.Go(func() {
		ticker := time.NewTicker(auditEvery)
		defer ticker.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-ticker.C:
				w.lookAtAll("")
				w.enrol.look()
			}
		}
	})
	group.Wait()
}

func (w *watcher) next(ctx context.Context) bool {
	item, shutdown := w.queue.Get()
	if shutdown {
		return false
	}
	defer w.queue.Done(item)
	var err error
	doubted := w.doubts(item.key)
	if item.gone != "" {
		w.forgetWarning(item.gone)
		w.forgetComplaint(item.gone)
		err = w.enrol.forget(ctx, item.gone, "")
	} else {
		err = w.reconcile(ctx, item.key, doubted)
	}
	if err == nil || ctx.Err() != nil {
		w.queue.Forget(item)
		return true
	}
	w.log.Warn("pod is not as it should be, will try again", zap.String("pod", item.key+item.gone), zap.Error(err))
	if doubted {
		w.setDoubt(item.key)
	}
	w.queue.AddRateLimited(item)
	return true
}

// reconcile makes one pod's part in the mesh what it is to be. With doubted set, the kernel is asked what it holds.
func (w *watcher) reconcile(ctx context.Context, key string, doubted bool) error {
	object, ok, err := w.pods.GetByKey(key)
	if err != nil || !ok {
		return err
	}
	pod := object.(*corev1.Pod)
	namespace, err := w.namespaceOf(ctx, pod)
	if err != nil {
		return err
	}
	uid := string(pod.UID)
	if !decide(pod, namespace, w.exclude).Enrol {
		w.forgetWarning(uid)
		w.forgetComplaint(uid)
		if err := w.enrol.release(ctx, uid); err != nil {
			return err
		}
		return w.annotate(ctx, pod, false)
	}
	rec := recordOf(pod)
	exclude, invalid := w.exclusions(pod, namespace)
	rec.Exclude = exclude
	if err := w.complain(ctx, pod, invalid); err != nil {
		return err
	}
	known, ok := w.enrol.records.get(uid)
	if !ok && (len(rec.IPs) == 0 || pod.DeletionTimestamp != nil) {
		return nil // its sandbox is still to be made, and then the plugin asks; or it is gone
	}
	held := !doubted && w.enrol.captured(known, rec.IPs) || w.enrol.holds(known, pod.Annotations[mirrorAnnotation])
	if !ok || !sameExclusions(known.Exclude, exclude) || !held {
		late := !ok && pod.CreationTimestamp.After(w.began)
		if err := w.enrol.capture(ctx, rec, late, pod.Annotations[mirrorAnnotation]); err != nil {
			return errors.Join(err, w.uncapturedPod(ctx, pod, err))
		}
		if late {
			w.tellLate(ctx, pod)
		}
	}
	w.forgetWarning(uid)
	return errors.Join(w.annotate(ctx, pod, true), w.conditionMet(ctx, pod))
}

// namespaceOf returns nil for a namespace that does not exist.
func (w *watcher) namespaceOf(ctx context.Context, pod *corev1.Pod) (*corev1.Namespace, error) {
	object, ok, err := w.namespaces.GetByKey(pod.Namespace)
	if err != nil {
		return nil, err
	}
	if ok {
		return object.(*corev1.Namespace), nil
	}
	namespace, err := w.cluster.namespace(ctx, pod.Namespace)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look up namespace %s: %w", pod.Namespace, err)
	}
	return namespace, nil
}

// annotate writes the annotation when it is not as wanted.
func (w *watcher) annotate(ctx context.Context, pod *corev1.Pod, redirected bool) error {
	if (pod.Annotations[redirectionAnnotation] == redirectionEnabled) == redirected {
		return nil
	}
	return w.cluster.annotate(ctx, pod, redirected)
}

// uncapturedPod refuses the traffic of a pod that could not be captured, unless it is redirected already, which refuses by
// itself; and says so on the pod, in an event and in a condition.
func (w *watcher) uncapturedPod(ctx context.Context, pod *corev1.Pod, reason error) error {
	var refused error
	if rec, ok := w.enrol.records.get(string(pod.UID)); !ok || !rec.Redirected {
		refused = w.enrol.redirector.Refuse(string(pod.UID))
	}
	err := errors.Join(refused, w.warn(ctx, pod, reason))
	if c := capturedCondition(pod); c != nil && c.Status == corev1.ConditionFalse {
		return err
	}
	return errors.Join(err, w.cluster.condition(ctx, pod, corev1.PodCondition{
		Type: capturedType, Status: corev1.ConditionFalse, Reason: "FailedCapture", Message: reason.Error(), LastTransitionTime: metav1.Now(),
	}))
}

// conditionMet takes uncapturedPod's condition back.
func (w *watcher) conditionMet(ctx context.Context, pod *corev1.Pod) error {
	if c := capturedCondition(pod); c == nil || c.Status == corev1.ConditionTrue {
		return nil
	}
	return w.cluster.condition(ctx, pod, corev1.PodCondition{
		Type: capturedType, Status: corev1.ConditionTrue, Reason: "Captured", LastTransitionTime: metav1.Now(),
	})
}

func capturedCondition(pod *corev1.Pod) *corev1.PodCondition {
	for i, c := range pod.Status.Conditions {
		if c.Type == capturedType {
			return &pod.Status.Conditions[i]
		}
	}
	return nil
}

// tellLate says that a pod has run outside the mesh for a moment.
func (w *watcher) tellLate(ctx context.Context, pod *corev1.Pod) {
	err := w.cluster.warn(ctx, pod, "CapturedLate", "the pod was started without the mesh's CNI plugin being asked, and was outside "+
		"the mesh until now: something else had rewritten the node's CNI configuration")
	if err != nil && ctx.Err() == nil {
		w.log.Warn("no event about a pod that was captured late", zap.String("pod", pod.Namespace+"/"+pod.Name), zap.Error(err))
	}
}

// warn attaches an event to a pod that could not be captured, once for each different reason.
func (w *watcher) warn(ctx context.Context, pod *corev1.Pod, reason error) error {
	message := fmt.Sprintf("the pod could not be captured by the mesh, and is tried again: %v", reason)
	w.mu.Lock()
	again := w.warned[string(pod.UID)] == message
	w.warned[string(pod.UID)] = message
	w.mu.Unlock()
	if again {
		return nil
	}
	return w.cluster.warn(ctx, pod, "FailedCapture", message)
}

func (w *watcher) forgetWarning(uid string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.warned, uid)
}

// uncaptured counts the pods that are to be in the mesh, have addresses, and could not be captured.
func (w *watcher) uncaptured() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.warned)
}

// podOf finds the pod that a sandbox is made for. The plugin is often quicker than the watch.
func (w *watcher) podOf(ctx context.Context, namespace, name, uid string) (*corev1.Pod, error) {
	if object, ok, err := w.pods.GetByKey(namespace + "/" + name); err == nil && ok && isPod(object.(*corev1.Pod), uid) {
		return object.(*corev1.Pod), nil
	}
	for {
		pod, err := w.cluster.pod(ctx, namespace, name)
		if err == nil && isPod(pod, uid) {
			return pod, nil
		}
		if err != nil && !apierrors.IsNotFound(err) {
			return nil, fmt.Errorf("look up pod %s/%s: %w", namespace, name, err)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("pod %s/%s with UID %q does not exist", namespace, name, uid)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// isPod tells whether a sandbox's UID is the pod's; a static pod's sandbox has the UID of its file.
func isPod(pod *corev1.Pod, uid string) bool {
	return uid == "" || slices.Contains([]string{string(pod.UID), pod.Annotations[mirrorAnnotation]}, uid)
}

func (w *watcher) exists(uid string) bool {
	return slices.ContainsFunc(w.pods.List(), func(o any) bool { return string(o.(*corev1.Pod).UID) == uid })
}

func recordOf(pod *corev1.Pod) record {
	rec := record{UID: string(pod.UID), Namespace: pod.Namespace, Name: pod.Name, ServiceAccount: pod.Spec.ServiceAccountName}
	if rec.ServiceAccount == "" {
		rec.ServiceAccount = "default"
	}
	var ips []string
	for _, ip := range pod.Status.PodIPs {
		ips = append(ips, ip.IP)
	}
	if len(ips) == 0 && pod.Status.PodIP != "" {
		ips = append(ips, pod.Status.PodIP)
	}
	rec.IPs = parseIPs(ips)
	return rec
}
