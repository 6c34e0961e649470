package source

import (
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/cache"
)

// Names of the indices.
const (
	byNode    = "node"
	byAddress = "address"
	byService = "service"
)

// Store is what is known of one kind. It is empty while the kind is not served.
type Store[T runtime.Object] struct{ watch *watch }

// Get finds an object; the namespace of cluster-scoped kinds is empty.
func (s Store[T]) Get(namespace, name string) (T, bool) {
	var none T
	key := name
	if namespace != "" {
		key = namespace + "/" + name
	}
	indexer := s.indexer()
	if indexer == nil {
		return none, false
	}
	obj, ok, err := indexer.GetByKey(key)
	if err != nil || !ok {
		return none, false
	}
	return obj.(T), true
}

// List is every object, in no order.
func (s Store[T]) List() []T {
	indexer := s.indexer()
	if indexer == nil {
		return nil
	}
	return typed[T](indexer.List())
}

// Namespace is every object of a namespace, in no order.
func (s Store[T]) Namespace(namespace string) []T { return s.index(cache.NamespaceIndex, namespace) }

func (s Store[T]) index(name, value string) []T {
	indexer := s.indexer()
	if indexer == nil {
		return nil
	}
	objects, err := indexer.ByIndex(name, value)
	if err != nil {
		return nil
	}
	return typed[T](objects)
}

func (s Store[T]) indexer() cache.Indexer {
	s.watch.mu.Lock()
	defer s.watch.mu.Unlock()
	if s.watch.informer == nil {
		return nil
	}
	return s.watch.informer.GetIndexer()
}

func typed[T runtime.Object](objects []any) []T {
	out := make([]T, len(objects))
	for i, o := range objects {
		out[i] = o.(T)
	}
	return out
}

// PodsOn are the pods of a node.
func (s *Sources) PodsOn(node string) []*corev1.Pod { return s.Pods.index(byNode, node) }

// PodsAt are the pods with an address of their own that is this one.
func (s *Sources) PodsAt(address string) []*corev1.Pod { return s.Pods.index(byAddress, address) }

// SlicesOf are the EndpointSlices of a service.
func (s *Sources) SlicesOf(namespace, service string) []*discoveryv1.EndpointSlice {
	return s.EndpointSlices.index(byService, namespace+"/"+service)
}

func podsByNode(obj any) ([]string, error) {
	if pod, ok := obj.(*corev1.Pod); ok && pod.Spec.NodeName != "" {
		return []string{pod.Spec.NodeName}, nil
	}
	return nil, nil
}

func podsByAddress(obj any) ([]string, error) {
	pod, ok := obj.(*corev1.Pod)
	if !ok || pod.Spec.HostNetwork {
		return nil, nil
	}
	var addresses []string
	for _, ip := range pod.Status.PodIPs {
		addresses = append(addresses, ip.IP)
	}
	if len(addresses) == 0 && pod.Status.PodIP != "" {
		addresses = []string{pod.Status.PodIP}
	}
	return addresses, nil
}

func slicesByService(obj any) ([]string, error) {
	if slice, ok := obj.(*discoveryv1.EndpointSlice); ok {
		if service := slice.Labels[discoveryv1.LabelServiceName]; service != "" {
			return []string{slice.Namespace + "/" + service}, nil
		}
	}
	return nil, nil
}
