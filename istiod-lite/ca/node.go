package ca

import (
	"context"
	"errors"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// Pods is what the node check asks of the cluster's pods.
type Pods interface {
	// Pod finds a pod by name.
	Pod(namespace, name string) (*corev1.Pod, bool)
	// PodsOn are the pods of a node.
	PodsOn(node string) []*corev1.Pod
}

// NodeCheck implements identity.Authorizer: a node proxy may have the certificates of its node's pods, and nobody may
// have another's otherwise.
type NodeCheck struct {
	TrustDomain string
	// NodeAccounts are the "<namespace>/<service account>" that node proxies run as.
	NodeAccounts []string
	Pods         Pods
}

// Authorize says why not, or nil.
func (n NodeCheck) Authorize(_ context.Context, caller identity.Caller, wanted mesh.Identity) error {
	if account := caller.Identity.Namespace + "/" + caller.Identity.ServiceAccount; !slices.Contains(n.NodeAccounts, account) {
		return fmt.Errorf("%s is not a node proxy's account", account)
	}
	if wanted.TrustDomain != n.TrustDomain {
		return fmt.Errorf("trust domain %q is not this mesh's", wanted.TrustDomain)
	}
	if caller.PodName == "" {
		return errors.New("the token is not bound to a pod")
	}
	proxy, ok := n.Pods.Pod(caller.Identity.Namespace, caller.PodName)
	if !ok {
		return fmt.Errorf("the caller's pod %s/%s does not exist", caller.Identity.Namespace, caller.PodName)
	}
	if caller.PodUID != "" && caller.PodUID != string(proxy.UID) {
		return fmt.Errorf("the caller's pod %s/%s is another one now", caller.Identity.Namespace, caller.PodName)
	}
	node := proxy.Spec.NodeName
	if node == "" || caller.Node != "" && caller.Node != node {
		return fmt.Errorf("the caller's pod %s/%s is not on node %q", caller.Identity.Namespace, caller.PodName, caller.Node)
	}
	for _, pod := range n.Pods.PodsOn(node) {
		if pod.Namespace == wanted.Namespace && accountOf(pod) == wanted.ServiceAccount &&
			pod.Status.Phase != corev1.PodSucceeded && pod.Status.Phase != corev1.PodFailed {
			return nil
		}
	}
	return fmt.Errorf("no pod with service account %s/%s runs on node %s", wanted.Namespace, wanted.ServiceAccount, node)
}

func accountOf(pod *corev1.Pod) string {
	if pod.Spec.ServiceAccountName == "" {
		return "default"
	}
	return pod.Spec.ServiceAccountName
}
