package install

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"time"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// WithdrawAnnotation on the agent's DaemonSet tells its pods, when they end, to clean their nodes. A DaemonSet that is
// merely deleted leaves pods of the mesh as they are: captured, and refused once the node proxy is gone too.
const WithdrawAnnotation = "fairlead-mesh.io/withdraw"

// Withdraw marks and deletes the agent's DaemonSet and waits, until ctx ends, for its pods to be gone: each cleans its node on the
// way out. It is run before the chart is uninstalled, because an agent whose permissions are deleted together with it
// could no longer tell that from a restart. It returns the nodes that did not answer in time.
func Withdraw(ctx context.Context, kubeconfig, namespace, name string, log *zap.Logger) (left []string, err error) {
	var config *rest.Config
	if kubeconfig == "" {
		config, err = rest.InClusterConfig()
	} else {
		config, err = clientcmd.BuildConfigFromFlags("", kubeconfig)
	}
	if err != nil {
		return nil, fmt.Errorf("configure the Kubernetes client: %w", err)
	}
	// Without any types: those of all groups would be most of the agent's memory, which is the same program.
	config.NegotiatedSerializer = serializer.NewCodecFactory(runtime.NewScheme()).WithoutConversion()
	config.ContentType = runtime.ContentTypeJSON
	client, err := rest.UnversionedRESTClientFor(config)
	if err != nil {
		return nil, err
	}
	return withdraw(ctx, client, namespace, name, log)
}

func withdraw(ctx context.Context, client rest.Interface, namespace, name string, log *zap.Logger) ([]string, error) {
	path := "/apis/apps/v1/namespaces/" + url.PathEscape(namespace) + "/daemonsets/" + url.PathEscape(name)
	selector, err := selectorOf(ctx, client, path)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look up DaemonSet %s/%s: %w", namespace, name, err)
	}
	mark := []byte(`{"metadata":{"annotations":{"` + WithdrawAnnotation + `":"true"}}}`)
	if err := client.Patch(types.MergePatchType).AbsPath(path).Body(mark).Do(ctx).Error(); err != nil {
		return nil, fmt.Errorf("mark DaemonSet %s/%s as withdrawn: %w", namespace, name, err)
	}
	// In the foreground: the DaemonSet stays, for its pods to read, until they have gone.
	foreground := []byte(`{"kind":"DeleteOptions","apiVersion":"v1","propagationPolicy":"Foreground"}`)
	if err := client.Delete().AbsPath(path).Body(foreground).Do(ctx).Error(); err != nil && !apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("delete DaemonSet %s/%s: %w", namespace, name, err)
	}
	log.Info("deleted the agents; each cleans its node", zap.String("daemonset", namespace+"/"+name))
	var left []string
	for {
		var pods struct{ Items []corev1.Pod }
		body, err := client.Get().AbsPath("/api/v1/namespaces", namespace, "pods").Param("labelSelector", selector).
			SetHeader("Accept", runtime.ContentTypeJSON).Do(ctx).Raw()
		if err == nil {
			err = json.Unmarshal(body, &pods)
		}
		switch {
		case err == nil && len(pods.Items) == 0:
			return nil, nil
		case err == nil:
			left = left[:0]
			for _, pod := range pods.Items {
				left = append(left, pod.Spec.NodeName)
			}
		case ctx.Err() == nil:
			log.Warn("list the agents that are left", zap.Error(err))
		}
		select {
		case <-ctx.Done():
			return left, nil
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// selectorOf is the label selector of the DaemonSet's pods.
func selectorOf(ctx context.Context, client rest.Interface, path string) (string, error) {
	var set struct {
		Spec struct {
			Selector *metav1.LabelSelector `json:"selector"`
		} `json:"spec"`
	}
	body, err := client.Get().AbsPath(path).SetHeader("Accept", "application/json").Do(ctx).Raw()
	if err != nil {
		return "", err
	}
	if err := json.Unmarshal(body, &set); err != nil {
		return "", err
	}
	selector, err := metav1.LabelSelectorAsSelector(set.Spec.Selector)
	if err != nil {
		return "", err
	}
	if selector.Empty() || selector.String() == labels.Nothing().String() {
		return "", fmt.Errorf("it selects no pods")
	}
	return selector.String(), nil
}
