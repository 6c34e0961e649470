package install

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
)

// apiServer answers as one with a DaemonSet of two pods, the second of which goes after a few questions, if ever.
func apiServer(t *testing.T, stays bool) (rest.Interface, func() []string) {
	t.Helper()
	var mu sync.Mutex
	var calls []string
	asked := 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		w.Header().Set("Content-Type", "application/json")
		reply := func(s string) { _, _ = w.Write([]byte(s)) }
		switch {
		case r.URL.Path == "/apis/apps/v1/namespaces/istio-system/daemonsets/cni" && r.Method == http.MethodGet:
			reply(`{"kind":"DaemonSet","apiVersion":"apps/v1","spec":{"selector":{"matchLabels":{"k8s-app":"cni"}}}}`)
		case strings.HasSuffix(r.URL.Path, "/daemonsets/cni"):
			calls = append(calls, r.Method)
			reply(`{"kind":"Status","apiVersion":"v1","status":"Success"}`)
		case r.URL.Path == "/api/v1/namespaces/istio-system/pods" && r.URL.Query().Get("labelSelector") == "k8s-app=cni":
			if asked++; asked < 2 || stays {
				reply(`{"kind":"PodList","apiVersion":"v1","items":[{"metadata":{"name":"a"},"spec":{"nodeName":"node2"}}]}`)
			} else {
				reply(`{"kind":"PodList","apiVersion":"v1","items":[]}`)
			}
		default:
			w.WriteHeader(http.StatusNotFound)
			reply(`{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404}`)
		}
	}))
	t.Cleanup(server.Close)
	client, err := rest.UnversionedRESTClientFor(&rest.Config{
		Host: server.URL, ContentConfig: rest.ContentConfig{NegotiatedSerializer: serializer.NewCodecFactory(runtime.NewScheme()).WithoutConversion()},
	})
	if err != nil {
		t.Fatal(err)
	}
	return client, func() []string {
		mu.Lock()
		defer mu.Unlock()
		return calls
	}
}

func TestWithdraw(t *testing.T) {
	for _, tc := range []struct {
		name  string
		set   string
		stays bool
		left  []string
		calls []string
	}{
		{"all nodes clean", "cni", false, nil, []string{"PATCH", "DELETE"}},
		{"a node does not answer", "cni", true, []string{"node2"}, []string{"PATCH", "DELETE"}},
		{"gone already", "other", false, nil, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			client, calls := apiServer(t, tc.stays)
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			left, err := withdraw(ctx, client, "istio-system", tc.set, zap.NewNop())
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.left, left); diff != "" {
				t.Errorf("nodes left (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tc.calls, calls()); diff != "" {
				t.Errorf("calls (-want +got):\n%s", diff)
			}
		})
	}
}
