package ca

import (
	"context"
	"fmt"
	"time"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
)

// RootConfigMap is where pods find the roots of the mesh, in every namespace, under the key root-cert.pem.
const RootConfigMap = "istio-ca-root-cert"

// RootPublisher keeps RootConfigMap in every namespace.
type RootPublisher struct {
	client kubernetes.Interface
	roots  string
	log    *zap.Logger
	queue  workqueue.TypedRateLimitingInterface[string]
}

// NewRootPublisher makes a publisher; Namespace tells it of namespaces, Run does the work.
func NewRootPublisher(client kubernetes.Interface, roots string, log *zap.Logger) *RootPublisher {
	limiter := workqueue.NewTypedItemExponentialFailureRateLimiter[string](50*time.Millisecond, time.Minute)
	return &RootPublisher{client: client, roots: roots, log: log, queue: workqueue.NewTypedRateLimitingQueue(limiter)}
}

// Namespace tells that a namespace is new or changed.
func (p *RootPublisher) Namespace(ns *corev1.Namespace) {
	if ns.DeletionTimestamp == nil {
		p.queue.Add(ns.Name)
	}
}

// Run publishes, and repairs what others change, until ctx ends.
func (p *RootPublisher) Run(ctx context.Context) error {
	lw := cache.NewListWatchFromClient(p.client.CoreV1().RESTClient(), "configmaps", metav1.NamespaceAll,
		fields.OneTermEqualSelector("metadata.name", RootConfigMap))
	return p.run(ctx, lw)
}

func (p *RootPublisher) run(ctx context.Context, lw cache.ListerWatcher) error {
	informer := cache.NewSharedIndexInformer(lw, &corev1.ConfigMap{}, 0, cache.Indexers{})
	changed := func(obj any) {
		if unknown, ok := obj.(cache.DeletedFinalStateUnknown); ok {
			obj = unknown.Obj
		}
		if m, ok := obj.(*corev1.ConfigMap); ok {
			p.queue.Add(m.Namespace)
		}
	}
	if _, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    changed,
		UpdateFunc: func(_, obj any) { changed(obj) },
		DeleteFunc: changed,
	}); err != nil {
		return fmt.Errorf("watch root ConfigMaps: %w", err)
	}
	go informer.RunWithContext(ctx)
	if !cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
		return nil
	}
	context.AfterFunc(ctx, p.queue.ShutDown)
	for {
		namespace, shutdown := p.queue.Get()
		if shutdown {
			return nil
		}
		if err := p.ensure(ctx, informer.GetStore(), namespace); err != nil {
			p.log.Warn("publish root certificate", zap.String("namespace", namespace), zap.Error(err))
			p.queue.AddRateLimited(namespace)
		} else {
			p.queue.Forget(namespace)
		}
		p.queue.Done(namespace)
	}
}

// ensure writes the ConfigMap of a namespace where it is missing or differs.
func (p *RootPublisher) ensure(ctx context.Context, store cache.Store, namespace string) error {
	configMaps := p.client.CoreV1().ConfigMaps(namespace)
	obj, exists, err := store.GetByKey(namespace + "/" + RootConfigMap)
	if err != nil {
		return err
	}
	if !exists {
		_, err := configMaps.Create(ctx, &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: RootConfigMap, Labels: map[string]string{"istio.io/config": "true"}},
			Data:       map[string]string{RootFile: p.roots},
		}, metav1.CreateOptions{})
		// A namespace that is gone or going needs none; one that exists is seen by the informer in a moment.
		if apierrors.IsAlreadyExists(err) || apierrors.IsNotFound(err) || apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
			return nil
		}
		return err
	}
	current := obj.(*corev1.ConfigMap)
	if current.Data[RootFile] == p.roots {
		return nil
	}
	next := current.DeepCopy()
	next.Data = map[string]string{RootFile: p.roots}
	_, err = configMaps.Update(ctx, next, metav1.UpdateOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}
