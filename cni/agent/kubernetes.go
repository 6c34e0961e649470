package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"go.uber.org/zap"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/fairlead-mesh/fairlead/cni/install"
	"github.com/fairlead-mesh/fairlead/cni/plugin"
	"github.com/fairlead-mesh/fairlead/internal/kubedir"
)

// cluster is where pods and namespaces come from, and where the agent says what it did.
type cluster interface {
	// podLists and namespaceLists feed the agent's caches.
	podLists() cache.ListerWatcher
	namespaceLists() cache.ListerWatcher
	// pod and namespace ask for one object now; the error is a NotFound of the API when there is none.
	pod(ctx context.Context, namespace, name string) (*corev1.Pod, error)
	namespace(ctx context.Context, name string) (*corev1.Namespace, error)
	// annotate writes on the pod whether it is captured.
	annotate(ctx context.Context, pod *corev1.Pod, redirected bool) error
	// condition sets a condition of the pod's status.
	condition(ctx context.Context, pod *corev1.Pod, c corev1.PodCondition) error
	// warn attaches an event to the pod.
	warn(ctx context.Context, pod *corev1.Pod, reason, message string) error
	// withdrawn tells whether the agent's DaemonSet says that the mesh is withdrawn from the nodes.
	withdrawn(ctx context.Context, namespace, name string) (bool, error)
	// access is how the CNI plugin may ask by itself, as a service account, NAMESPACE/NAME, and for how long.
	access(ctx context.Context, account string) (plugin.Access, time.Duration, error)
}

// api is a Kubernetes API server. It is asked by a plain REST client for the core group: the typed clients of all groups
// would be most of the agent's memory.
type api struct {
	core   *rest.RESTClient
	config *rest.Config
	node   string
}

func newAPI(kubeconfig, node string) (*api, error) {
	var config *rest.Config
	var err error
	if kubeconfig == "" {
		config, err = rest.InClusterConfig()
	} else {
		config, err = clientcmd.BuildConfigFromFlags("", kubeconfig)
	}
	if err != nil {
		return nil, fmt.Errorf("configure the Kubernetes client: %w", err)
	}
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	config.APIPath = "/api"
	config.GroupVersion = &corev1.SchemeGroupVersion
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	config.ContentType = runtime.ContentTypeProtobuf
	config.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	config.QPS, config.Burst = 50, 200 // every pod of a full node may be written to at once
	config.UserAgent = "fairlead-cni-agent"
	core, err := rest.RESTClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("make the Kubernetes client: %w", err)
	}
	return &api{core, config, node}, nil
}

func (a *api) podLists() cache.ListerWatcher {
	return cache.NewListWatchFromClient(a.core, "pods", metav1.NamespaceAll, fields.OneTermEqualSelector("spec.nodeName", a.node))
}

func (a *api) namespaceLists() cache.ListerWatcher {
	return cache.NewListWatchFromClient(a.core, "namespaces", metav1.NamespaceAll, fields.Everything())
}

func (a *api) pod(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
	pod := &corev1.Pod{}
	return pod, a.core.Get().Namespace(namespace).Resource("pods").Name(name).Do(ctx).Into(pod)
}

func (a *api) namespace(ctx context.Context, name string) (*corev1.Namespace, error) {
	namespace := &corev1.Namespace{}
	return namespace, a.core.Get().Resource("namespaces").Name(name).Do(ctx).Into(namespace)
}

func (a *api) annotate(ctx context.Context, pod *corev1.Pod, redirected bool) error {
	var value any
	if redirected {
		value = redirectionEnabled
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"uid": pod.UID, "annotations": map[string]any{redirectionAnnotation: value},
	}})
	if err != nil {
		return err
	}
	err = a.core.Patch(types.MergePatchType).Namespace(pod.Namespace).Resource("pods").Name(pod.Name).SubResource("status").
		Body(patch).Do(ctx).Error()
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("annotate pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return nil
}

func (a *api) condition(ctx context.Context, pod *corev1.Pod, c corev1.PodCondition) error {
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": pod.UID}, "status": map[string]any{"conditions": []corev1.PodCondition{c}},
	})
	if err != nil {
		return err
	}
	// Strategic, so that other conditions stay.
	err = a.core.Patch(types.StrategicMergePatchType).Namespace(pod.Namespace).Resource("pods").Name(pod.Name).SubResource("status").
		Body(patch).Do(ctx).Error()
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("set condition %s of pod %s/%s: %w", c.Type, pod.Namespace, pod.Name, err)
	}
	return nil
}

func (a *api) warn(ctx context.Context, pod *corev1.Pod, reason, message string) error {
	now := metav1.NewTime(time.Now())
	event := &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{GenerateName: pod.Name + ".", Namespace: pod.Namespace},
		InvolvedObject: corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID},
		Reason:         reason, Message: message, Type: corev1.EventTypeWarning,
		Source:         corev1.EventSource{Component: "fairlead-cni", Host: a.node},
		FirstTimestamp: now, LastTimestamp: now, Count: 1,
	}
	if err := a.core.Post().Namespace(pod.Namespace).Resource("events").Body(event).Do(ctx).Error(); err != nil {
		return fmt.Errorf("write an event for pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return nil
}

func (a *api) withdrawn(ctx context.Context, namespace, name string) (bool, error) {
	body, err := a.core.Get().AbsPath("/apis/apps/v1/namespaces", namespace, "daemonsets", name).
		SetHeader("Accept", runtime.ContentTypeJSON).Do(ctx).Raw()
	if apierrors.IsNotFound(err) {
		return false, nil // deleted by somebody who did not say that pods are to leave the mesh
	}
	if err != nil {
		return false, fmt.Errorf("look up DaemonSet %s/%s: %w", namespace, name, err)
	}
	var set appsv1.DaemonSet
	if err := json.Unmarshal(body, &set); err != nil {
		return false, fmt.Errorf("decode DaemonSet %s/%s: %w", namespace, name, err)
	}
	return set.Annotations[install.WithdrawAnnotation] != "", nil
}

// directory is a directory of YAML files. Nobody reads annotations or events there, so they go to the log.
type directory struct {
	dir  *kubedir.Dir
	node string
	log  *zap.Logger
	// caches are the agent's own, which follow the directory.
	caches func() (pods, namespaces cache.Store)
}

func (d *directory) podLists() cache.ListerWatcher { return d.dir.ListerWatcher(&corev1.Pod{}) }

func (d *directory) namespaceLists() cache.ListerWatcher {
	return d.dir.ListerWatcher(&corev1.Namespace{})
}

func (d *directory) pod(_ context.Context, namespace, name string) (*corev1.Pod, error) {
	pods, _ := d.caches()
	object, ok, err := pods.GetByKey(namespace + "/" + name)
	if err != nil || !ok {
		return nil, apierrors.NewNotFound(corev1.Resource("pods"), name)
	}
	return object.(*corev1.Pod), nil
}

func (d *directory) namespace(_ context.Context, name string) (*corev1.Namespace, error) {
	_, namespaces := d.caches()
	object, ok, err := namespaces.GetByKey(name)
	if err != nil || !ok {
		return nil, apierrors.NewNotFound(corev1.Resource("namespaces"), name)
	}
	return object.(*corev1.Namespace), nil
}

func (d *directory) annotate(context.Context, *corev1.Pod, bool) error { return nil }

func (d *directory) condition(context.Context, *corev1.Pod, corev1.PodCondition) error { return nil }

func (d *directory) warn(_ context.Context, pod *corev1.Pod, reason, message string) error {
	d.log.Warn(message, zap.String("pod", pod.Namespace+"/"+pod.Name), zap.String("reason", reason))
	return nil
}

func (d *directory) withdrawn(context.Context, string, string) (bool, error) { return false, nil }
